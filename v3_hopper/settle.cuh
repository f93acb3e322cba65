// The reference of the exponentials is not looked for in every block: sums that stay small prove
// that no score has exceeded it by much. What is here runs when they do not.
#pragma once

#include "v3_hopper/softmax.cuh"

namespace flash::v3 {

inline constexpr float kLargeSum = 8192.0f;  // of one thread's part of a row; fp16 ends at 65504
inline constexpr float kHugeExponential = 1.2676506e30f;  // 2^100: nearer to infinity, look again

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Where an element lies in a tile of 128-byte chunks with 128-byte swizzle.
template <class Element>
__device__ __forceinline__ const Element* find(const unsigned char* tile, int rows, int row,
                                               int column) {
  constexpr int kColumns = kChunkBytes / int(sizeof(Element)), kUnit = 16 / int(sizeof(Element));
  const int unit = column % kColumns / kUnit ^ row % 8;
  const int at = (column / kColumns * rows + row) * kColumns + unit * kUnit + column % kUnit;
  return reinterpret_cast<const Element*>(tile) + at;
}

// The scores of those of this thread's two rows that are marked, once more.
template <class Traits>
__device__ __forceinline__ void recompute(float (&s)[Traits::kBlockKV / 2], const bool (&marked)[2],
                                          const unsigned char* q, const unsigned char* k) {
  using Element = typename Traits::Element;
  constexpr int kEightRows = 8 * kChunkBytes / int(sizeof(Element));
  const int row = threadIdx.x % kGroupThreads / kWarp * 16 + threadIdx.x % kWarp / 4;
#pragma unroll
  for (int i = 0; i < Traits::kBlockKV / 2; ++i) s[i] = marked[i / 2 % 2] ? 0.0f : s[i];
#pragma unroll 1
  for (int column = 0; column < Traits::kHeadDim; ++column) {
    const auto* sQ = find<Element>(q, kGroupRows, row, column);
    const float q0 = float(sQ[0]), q1 = float(sQ[kEightRows]);
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int key = threadIdx.x % 4 * 2 + odd;
      const auto* sK = find<Element>(k, Traits::kBlockKV, key, column);
#pragma unroll
      for (int i = odd; i < Traits::kBlockKV / 2; i += 4) {
        const float x = float(sK[i / 4 * kEightRows]);
        if (marked[0]) s[i] = fmaf(q0, x, s[i]);
        if (marked[1]) s[i + 2] = fmaf(q1, x, s[i + 2]);
      }
    }
  }
}

// Raises the reference of the rows whose exponentials have become large, and lowers these; a row
// whose exponentials may have overflowed is computed again, `mask` included. O must then be
// rescaled.
template <class Traits, class Mask>
__device__ __forceinline__ void settle(float (&p)[Traits::kBlockKV / 2], BlockSum& sum,
                                       RowState& state, float (&correction)[2], const Scale& scale,
                                       const unsigned char* q, const unsigned char* k,
                                       const Mask& mask) {
  bool huge[2];
  float highest[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < Traits::kBlockKV / 2; ++i) {
    highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], p[i]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool large = quad_max(sum.row(half)) > kLargeSum;
    highest[half] = quad_max(highest[half]);
    huge[half] = large && highest[half] > kHugeExponential;
    correction[half] = 1.0f;
    if (large && !huge[half]) {
      const float raised = state.row_max[half] + __log2f(highest[half]) / scale.to_log2;
      correction[half] = fast_exp2((state.row_max[half] - raised) * scale.to_log2);
      state.row_max[half] = raised;
    }
  }
#pragma unroll
  for (int i = 0; i < Traits::kBlockKV / 2; ++i) p[i] *= correction[i / 2 % 2];
  if (__any_sync(~0u, huge[0] || huge[1])) {
    recompute<Traits>(p, huge, q, k);
    mask();
    highest[0] = highest[1] = -INFINITY;
#pragma unroll
    for (int i = 0; i < Traits::kBlockKV / 2; ++i) {
      highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], p[i]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = quad_max(highest[half]);
      if (!huge[half]) continue;
      correction[half] = fast_exp2((state.row_max[half] - highest[half]) * scale.to_log2);
      state.row_max[half] = highest[half];
    }
#pragma unroll
    for (int i = 0; i < Traits::kBlockKV / 2; ++i) {
      if (huge[i / 2 % 2]) {
        p[i] = fast_exp2(fmaf(p[i], scale.to_log2, -highest[i / 2 % 2] * scale.to_log2));
      } else if (p[i] == -INFINITY) {
        p[i] = 0.0f;  // masked again
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Traits::kBlockKV / 2; ++i) {
    sum.chain[i / 2 % 2][i % 2] = i < 4 ? p[i] : sum.chain[i / 2 % 2][i % 2] + p[i];
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) state.row_sum[half] *= correction[half];
}

}  // namespace flash::v3
