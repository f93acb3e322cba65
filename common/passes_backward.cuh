// The passes around the main kernel: row statistics before it, dQ's rounding after it.
#pragma once

#include <math_constants.h>

#include "common/scores_backward.cuh"
#include "common/store_backward.cuh"
#include "common/workspace_backward.cuh"

namespace flash {

inline constexpr int kPassThreads = 256;

// LSE * log2(e) and delta = rowsum(dO * O) - dLSE for one block of rows, and dQ's zeros.
template <class Traits>
__global__ void __launch_bounds__(kPassThreads)
    prepare_kernel(const __grid_constant__ BackwardParams p, BackwardWorkspace<Traits> workspace,
                   int blocks) {
  using Element = typename Traits::Element;
  constexpr int kElements = 16 / int(sizeof(Element));
  constexpr int kChunks = Traits::kHeadDim / kElements;
  constexpr int kLanes = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;  // that share a row
  const RowBlock<Traits::kBlockQ> block(p, blocks);
  const Sequence sequence(p, block.batch);
  if (block.row >= sequence.seqlen_q) return;
  const int64_t padded = BackwardWorkspace<Traits>::first_row(p, block.batch, sequence.row_q);
  const int64_t at = block.head * workspace.rows + padded + block.row;
  const Element* o = static_cast<const Element*>(p.o.data) + block.batch * p.o.batch +
                     sequence.row_q * p.o.row + block.head * p.o.head;
  const Element* dout = static_cast<const Element*>(p.dout.data) + block.batch * p.dout.batch +
                        sequence.row_q * p.dout.row + block.head * p.dout.head;
  const bool o_aligned = rows_aligned(o, p.o.row), dout_aligned = rows_aligned(dout, p.dout.row);
  const int64_t stats_row = sequence.row_q;
  const int chunk = threadIdx.x % kLanes;
#pragma unroll
  for (int n = 0; n < Traits::kBlockQ * kLanes / kPassThreads; ++n) {
    const int r = (n * kPassThreads + threadIdx.x) / kLanes;
    const int row = block.row + r;
    float sum = 0.0f;
    if (row < sequence.seqlen_q && chunk * kElements < p.head_dim_v) {
      const uint4 a = load_chunk(o + row * p.o.row + chunk * kElements, o_aligned);
      const uint4 b = load_chunk(dout + row * p.dout.row + chunk * kElements, dout_aligned);
      const uint32_t* x = reinterpret_cast<const uint32_t*>(&a);
      const uint32_t* y = reinterpret_cast<const uint32_t*>(&b);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(Element) == 4) {
          sum += __uint_as_float(x[i]) * __uint_as_float(y[i]);
        } else {
          const float2 u = unpack<Element>(x[i]), v = unpack<Element>(y[i]);
          sum += u.x * v.x + u.y * v.y;
        }
      }
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (chunk == 0) {
      const int64_t stat = block.head * p.lse.head + block.batch * p.lse.batch + stats_row + row;
      float lse = row < sequence.seqlen_q ? p.lse.data[stat] : -CUDART_INF_F;
      const bool empty = lse == -CUDART_INF_F;
      if (!empty && p.dlse.data != nullptr) {
        sum -= p.dlse.data[block.head * p.dlse.head + block.batch * p.dlse.batch + stats_row + row];
      }
      workspace.lse[at + r] = empty ? CUDART_INF_F : lse * kLog2e;
      workspace.delta[at + r] = empty ? 0.0f : sum;
    }
  }
  if (workspace.dq == nullptr) return;
  int4* dq = reinterpret_cast<int4*>(workspace.dq + at * Traits::kHeadDim);
  for (int i = threadIdx.x; i < Traits::kBlockQ * Traits::kHeadDim / 4; i += kPassThreads) {
    dq[i] = int4{0, 0, 0, 0};
  }
}

// In a quad of lanes: lane t gives x[s] to lane s, and receives lane s's x[t] as result s.
__device__ __forceinline__ uint4 transpose_quad(const uint32_t (&x)[4]) {
  const int t = threadIdx.x % 4;
  uint32_t y[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int s = t ^ r;
    const uint32_t mine = s == 0 ? x[0] : s == 1 ? x[1] : s == 2 ? x[2] : x[3];
    const uint32_t theirs = __shfl_xor_sync(0xffffffffu, mine, r);
#pragma unroll
    for (int n = 0; n < 4; ++n) y[n] = r == 0 || n == s ? theirs : y[n];
  }
  return {y[0], y[1], y[2], y[3]};
}

// dQ = scale * sum, from fp32 fragments to rows: a warp takes 16 rows and 32 columns at a time.
template <class Traits>
__global__ void __launch_bounds__(kPassThreads)
    finish_kernel(const __grid_constant__ BackwardParams p, BackwardWorkspace<Traits> workspace,
                  int blocks) {
  using Element = typename Traits::Element;
  constexpr int kTiles = Traits::kHeadDim / 8;  // of 16 rows and 8 columns, side by side
  const RowBlock<Traits::kBlockQ> block(p, blocks);
  const Sequence sequence(p, block.batch);
  if (block.row >= sequence.seqlen_q) return;
  const int64_t padded = BackwardWorkspace<Traits>::first_row(p, block.batch, sequence.row_q);
  const float* dq =
      workspace.dq + (block.head * workspace.rows + padded + block.row) * Traits::kHeadDim;
  Element* target = row_of<Element>(p.dq, block.batch, sequence.row_q, block.head, block.row);
  const bool aligned = rows_aligned(target, p.dq.row);
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < Traits::kBlockQ / 16 * (kTiles / 4); i += kPassThreads / 32) {
    const int row = i / (kTiles / 4) * 16, tile = i % (kTiles / 4) * 4;
    float4 sums[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      sums[n] = load_fragment(dq + (row / 16 * kTiles + tile + n) * 128, lane);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + half * 8 + lane / 4;
      const bool in_rows = block.row + r < sequence.seqlen_q;
      uint32_t pairs[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float low = (half == 0 ? sums[n].x : sums[n].z) * p.scale;
        const float high = (half == 0 ? sums[n].y : sums[n].w) * p.scale;
        if constexpr (sizeof(Element) == 4) {
          Element* to = target + r * p.dq.row + (tile + n) * 8 + lane % 4 * 2;
          if (in_rows && (tile + n) * 8 < p.head_dim) to[0] = low, to[1] = high;
        } else {
          pairs[n] = pack<Element>(low, high);
        }
      }
      if constexpr (sizeof(Element) == 2) {
        const uint4 chunk = transpose_quad(pairs);
        const int column = (tile + lane % 4) * 8;
        if (in_rows && column < p.head_dim) {
          store_chunk(target + r * p.dq.row + column, chunk, aligned);
        }
      }
    }
  }
}

}  // namespace flash
