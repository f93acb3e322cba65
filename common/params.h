// What a kernel is asked to do: plain pointers, strides, sizes and a stream; no torch, no Python.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash {

enum class DType : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat8E4M3 = 3 };

// A tensor indexed (batch, row, head, dim); strides in elements, dim is contiguous.
// Packed (varlen) tensors are (total_rows, head, dim): their batch stride is 0.
struct View {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t row = 0;
  int64_t head = 0;
};

inline constexpr int kUnlimited = -1;  // a window side without a limit

// The mathematics of one call, the same for forward and backward.
struct Problem {
  DType dtype = DType::kBFloat16;
  int batch = 0;
  int heads_q = 0;
  int heads_kv = 0;
  int seqlen_q = 0;  // varlen: the longest sequence
  int seqlen_k = 0;
  int64_t total_q = 0;  // rows in all: batch * seqlen_q, or cu_seqlens_q[batch]
  int64_t total_k = 0;
  int head_dim = 0;    // of Q and K, as given (kernels pad on chip)
  int head_dim_v = 0;  // of V and O
  float scale = 1.0f;
  float softcap = 0.0f;           // 0: off; else S = softcap * tanh(S / softcap)
  int window_left = kUnlimited;   // keys visible left of the diagonal
  int window_right = kUnlimited;  // and right of it; causal is 0
  bool top_left = false;  // the diagonal starts at (0, 0), else it ends at the last row and key
  bool deterministic = false;
};

// FP8 scales: value = stored * descale. One per (batch, block of rows, KV head); a stride of 0
// broadcasts.
struct Descale {
  const float* data = nullptr;  // null: 1
  int64_t batch = 0;
  int64_t block = 0;
  int64_t head = 0;
  int rows = 0;  // rows that share one scale; 0: all rows
};

// Row statistics, fp32: (batch, head, row), or (head, total_rows) when varlen; rows are contiguous.
struct RowStats {
  float* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
};

struct ForwardParams : Problem {
  View q, k, v, o;
  RowStats lse;                       // natural log; -inf for a row that sees no key
  const int* cu_seqlens_q = nullptr;  // (batch + 1), device memory; null: dense
  const int* cu_seqlens_k = nullptr;
  Descale q_descale, k_descale, v_descale;
  void* workspace = nullptr;  // forward_workspace(p) bytes, 256-byte aligned, contents undefined
  cudaStream_t stream = nullptr;
};

struct BackwardParams : Problem {
  View q, k, v, o, dout, dq, dk, dv;
  RowStats lse;
  RowStats dlse;  // gradient that arrives through LSE; null data: none
  const int* cu_seqlens_q = nullptr;
  const int* cu_seqlens_k = nullptr;
  void* workspace = nullptr;  // backward_workspace(p) bytes
  cudaStream_t stream = nullptr;
};

}  // namespace flash
