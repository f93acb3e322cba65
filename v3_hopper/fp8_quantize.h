// 16-bit tensors into e4m3 with a scale per block of rows, per head or per tensor: one pass.
#pragma once

#include "common/params.h"

namespace flash::v3::fp8 {

// Who shares a scale: a block of rows, all rows of a head, or the whole tensor.
enum class Granularity : int { kBlock = 0, kHead = 1, kTensor = 2 };

// One of Q, K and V.
struct QuantizeTensor {
  View source;               // (batch, rows, heads, dim)
  void* stored = nullptr;    // the same shape, contiguous, e4m3
  float* descale = nullptr;  // (batch, blocks, heads_kv); one block unless per block
  float* amax = nullptr;     // zeros: (batch, heads_kv) per head, one per tensor; not per block
  const int* cu_seqlens = nullptr;  // (batch + 1): packed sequences, of at most `rows` rows
  int batch = 0, rows = 0, heads = 0, heads_kv = 0;
  int block_rows = 0;   // rows of a block; heads / heads_kv heads share its scale
  bool rotate = false;  // random signs and the Hadamard matrix over dim
  bool spread = false;  // where not rotated: errors of a column cancel over rows
  // Where not rotated, nor packed: stored as (batch, heads, dim, rows). Rows are multiples of 16.
  bool keys_first = false;
};

struct QuantizeParams {
  static constexpr int kMost = 3;
  DType dtype = DType::kBFloat16;
  int dim = 0, count = 0;
  Granularity granularity = Granularity::kBlock;
  QuantizeTensor tensors[kMost];
  cudaStream_t stream = nullptr;
};

// All tensors in one launch, in two where a scale reaches beyond a block. cudaErrorInvalidValue: a
// dtype or head dim that no kernel serves.
cudaError_t quantize(const QuantizeParams& p);

}  // namespace flash::v3::fp8
