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

// Rows whose exponentials may have overflowed: their scores once more, the highest of these as the
// reference, and exponentials by it.
template <class Traits, class Mask>
__device__ __forceinline__ void redo(float (&p)[Traits::kBlockKV / 2], const bool (&huge)[2],
                                     RowState& state, float (&correction)[2], const Scale& scale,
                                     const unsigned char* q, const unsigned char* k,
                                     const Mask& mask) {
  recompute<Traits>(p, huge, q, k);
  mask();
  float highest[2] = {-INFINITY, -INFINITY};
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
      p[i] = 0.0f;  // another row's zero, masked again
    }
  }
}

// Raises the reference of the rows whose exponentials have become large, and lowers these. O must
// then be rescaled by `correction`.
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
    redo<Traits>(p, huge, state, correction, scale, q, k, mask);
  }
#pragma unroll
  for (int i = 0; i < Traits::kBlockKV / 2; ++i) {
    sum.chain[i / 2 % 2][i % 2] = i < 4 ? p[i] : sum.chain[i / 2 % 2][i % 2] + p[i];
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) state.row_sum[half] *= correction[half];
}

// The softmax of a warpgroup's rows, block after block.
template <class Traits>
struct Softmax {
  const Scale scale;
  RowState state = kNoRows;
  float correction[2];
  bool unseen = true;  // some row of this warp has no reference yet

  // S, which `mask` has still to be applied to, becomes P; true where O must be rescaled. The
  // highest score is sought only while a row lacks a reference, as in a tile's first block.
  template <bool kOpensTile, class Mask>
  __device__ __forceinline__ bool block(float (&s)[Traits::kBlockKV / 2], const unsigned char* q,
                                        const unsigned char* k, const Mask& mask) {
    bool risen = false;
    mask();
    if (kOpensTile) state = kNoRows;
    if (Traits::kFeatured || kOpensTile || unseen) {
      risen = update<Traits>(s, state, correction, scale);
      unseen = __any_sync(~0u, state.row_max[0] == -INFINITY || state.row_max[1] == -INFINITY);
    }
    BlockSum sum = exponentials(s, state, scale);
    if constexpr (!Traits::kFeatured && !kOpensTile) {
      if (__any_sync(~0u, sum.row(0) > kLargeSum || sum.row(1) > kLargeSum)) {
        float more[2];
        settle<Traits>(s, sum, state, more, scale, q, k, mask);
        correction[0] = risen ? correction[0] * more[0] : more[0];
        correction[1] = risen ? correction[1] * more[1] : more[1];
        risen = true;
      }
    }
    state.row_sum[0] += sum.row(0);
    state.row_sum[1] += sum.row(1);
    return risen;
  }
};

}  // namespace flash::v3
