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

// dQ = scale * sum, from fp32 fragments to rows.
template <class Traits>
__global__ void __launch_bounds__(kPassThreads)
    finish_kernel(const __grid_constant__ BackwardParams p, BackwardWorkspace<Traits> workspace,
                  int blocks) {
  using Element = typename Traits::Element;
  constexpr int kChunks = Traits::kHeadDim / 8;
  const RowBlock<Traits::kBlockQ> block(p, blocks);
  const Sequence sequence(p, block.batch);
  if (block.row >= sequence.seqlen_q) return;
  const int64_t padded = BackwardWorkspace<Traits>::first_row(p, block.batch, sequence.row_q);
  const float* dq =
      workspace.dq + (block.head * workspace.rows + padded + block.row) * Traits::kHeadDim;
  Element* target = static_cast<Element*>(p.dq.data) + block.batch * p.dq.batch +
                    sequence.row_q * p.dq.row + block.head * p.dq.head;
  const bool aligned = rows_aligned(target, p.dq.row);
#pragma unroll 4
  for (int i = threadIdx.x; i < Traits::kBlockQ * kChunks; i += kPassThreads) {
    const int r = i / kChunks, chunk = i % kChunks;
    if (block.row + r >= sequence.seqlen_q || chunk * 8 >= p.head_dim) continue;
    const float* tile = dq + (r / 16 * kChunks + chunk) * 128;
    Element* to = target + (block.row + r) * p.dq.row + chunk * 8;
    float sums[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      sums[c] = tile[fragment_offset(r % 8 * 4 + c / 2, r % 16 / 8 * 2 + c % 2)] * p.scale;
    }
    if constexpr (sizeof(Element) == 4) {
#pragma unroll
      for (int c = 0; c < 8; ++c) to[c] = sums[c];
    } else {
      store_chunk(to,
                  {pack<Element>(sums[0], sums[1]), pack<Element>(sums[2], sums[3]),
                   pack<Element>(sums[4], sums[5]), pack<Element>(sums[6], sums[7])},
                  aligned);
    }
  }
}

}  // namespace flash
