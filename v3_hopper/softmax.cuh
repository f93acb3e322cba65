// The online softmax of one warpgroup's 64 rows: mask, update, rescale, normalize.
#pragma once

#include <cfloat>

#include "v3_hopper/traits.cuh"

namespace flash::v3 {

// A thread holds parts of two rows, 8 apart; the four threads of a quad share them.
struct RowState {
  float row_max[2];  // reference of the exponentials, in units of S
  float row_sum[2];  // of this thread's columns only, until normalize
};

__device__ constexpr RowState kNoRows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};

struct Scale {
  float to_log2;  // exp2(to_log2 * S) is the exponential of the scaled score
  float slack;    // how far S may exceed the reference before `update` raises it
  float scale, softcap;
};

template <class Traits>
__device__ __forceinline__ Scale make_scale(const ForwardParams& p) {
  constexpr float kLog2E = 1.4426950408889634f;
  constexpr float kSlackLog2 = 8.0f;  // probabilities stay below 2^8: exact in fp32 sums
  const float to_log2 = Traits::kFeatured ? kLog2E : p.scale * kLog2E;
  return {to_log2, Traits::kFeatured ? kSlackLog2 / to_log2 : FLT_MAX, p.scale, p.softcap};
}

// Scores that are not a plain multiple of Q K^T.
template <class Traits>
__device__ __forceinline__ void feature(float (&s)[Traits::kBlockKV / 2], const Scale& scale) {
  if constexpr (Traits::kFeatured) {
    constexpr float kTwoLog2E = 2.8853900817779268f;
    const bool cap = scale.softcap > 0.0f;
    const float factor = cap ? scale.scale / scale.softcap * kTwoLog2E : scale.scale;
#pragma unroll
    for (int i = 0; i < Traits::kBlockKV / 2; ++i) {
      s[i] *= factor;
      // tanh(y) = 1 - 2 / (1 + exp(2 y))
      if (cap) s[i] = scale.softcap - __fdividef(2.0f * scale.softcap, 1.0f + fast_exp2(s[i]));
    }
  }
}

// Of a thread's columns 0, 1, 8, 9, 16, ... how many are below `end`.
__device__ __forceinline__ int columns_below(int end) {
  const int inside = max(end, 0);
  return inside / 8 * 2 + min(inside % 8, 2);
}

// Scores that a row must not see become -inf. `row` is the first of this thread's two rows.
template <class Traits>
__device__ __forceinline__ void mask(float (&s)[Traits::kBlockKV / 2], const Sequence& sequence,
                                     int row, int key) {
  const int first_column = key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int begin = columns_below(row + 8 * half + sequence.first - first_column);
    const int last = min(row + 8 * half + sequence.last, sequence.seqlen_k - 1);
    const int end = columns_below(last + 1 - first_column);
#pragma unroll
    for (int base = 0; base < Traits::kBlockKV / 4; base += 32) {  // one bit for each column
      const uint32_t visible = lowest_bits(end - base) & ~lowest_bits(begin - base);
#pragma unroll
      for (int bit = 0; bit < 32 && base + bit < Traits::kBlockKV / 4; ++bit) {
        float& score = s[(base + bit) / 2 * 4 + half * 2 + bit % 2];
        score = visible >> bit & 1 ? score : -INFINITY;
      }
    }
  }
}

// Raises the reference of the exponentials in rows where a score exceeds it by the slack: then O
// must be rescaled by `correction`, and true is returned, to all of a warp. A row depends on its
// own scores alone, so that its bits are the same whatever its neighbours are.
template <class Traits>
__device__ __forceinline__ bool update(const float (&s)[Traits::kBlockKV / 2], RowState& state,
                                       float (&correction)[2], const Scale& scale) {
  float chain[2][2] = {{s[0], s[1]}, {s[2], s[3]}};  // two for each row
#pragma unroll
  for (int i = 4; i < Traits::kBlockKV / 2; ++i) {
    chain[i / 2 % 2][i % 2] = fmaxf(chain[i / 2 % 2][i % 2], s[i]);
  }
  float block_max[2] = {fmaxf(chain[0][0], chain[0][1]), fmaxf(chain[1][0], chain[1][1])};
  const bool risen = __any_sync(~0u, block_max[0] > state.row_max[0] + scale.slack ||
                                         block_max[1] > state.row_max[1] + scale.slack);
  if (!risen) return false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& highest = block_max[half];
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
    if (!(highest > state.row_max[half] + scale.slack)) highest = state.row_max[half];
    const float reference = highest == -INFINITY ? 0.0f : highest;
    correction[half] = fast_exp2((state.row_max[half] - reference) * scale.to_log2);
    state.row_max[half] = highest;
    state.row_sum[half] *= correction[half];
  }
  return true;
}

// S becomes P = exp(S - reference); returns the sums of this block.
struct BlockSum {
  float chain[2][2];  // two chains for each row
  __device__ __forceinline__ float row(int half) const { return chain[half][0] + chain[half][1]; }
};
template <int N>
__device__ __forceinline__ BlockSum exponentials(float (&s)[N], const RowState& state,
                                                 const Scale& scale) {
  BlockSum sum;
  float offset[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float reference = state.row_max[half] == -INFINITY ? 0.0f : state.row_max[half];
    offset[half] = reference * scale.to_log2;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    s[i] = fast_exp2(fmaf(s[i], scale.to_log2, -offset[i / 2 % 2]));
    float& chain = sum.chain[i / 2 % 2][i % 2];
    chain = i < 4 ? s[i] : chain + s[i];
  }
  return sum;
}

// P in the layout of a register operand: the accumulators' own order, two to a register.
template <class Traits>
__device__ __forceinline__ void pack(uint32_t (&p)[Traits::kBlockKV / 4],
                                     const float (&s)[Traits::kBlockKV / 2]) {
#pragma unroll
  for (int i = 0; i < Traits::kBlockKV / 4; ++i) {
    p[i] = pack_pair<typename Traits::Element>(s[2 * i], s[2 * i + 1]);
  }
}

template <int N>
__device__ __forceinline__ void clear(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) r[i] = 0.0f;
}

template <class Traits>
__device__ __forceinline__ void rescale(float (&o)[Traits::kHeadDimV / 2],
                                        const float (&correction)[2]) {
#pragma unroll
  for (int i = 0; i < Traits::kHeadDimV / 2; ++i) o[i] *= correction[i / 2 % 2];
}

// O / row_sum; lse becomes the natural log-sum-exp, -inf for a row that saw nothing.
template <class Traits>
__device__ __forceinline__ void normalize(float (&o)[Traits::kHeadDimV / 2], RowState& state,
                                          float (&lse)[2], const Scale& scale) {
  constexpr float kLn2 = 0.6931471805599453f;
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& sum = state.row_sum[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    inverse[half] = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
    lse[half] =
        sum == 0.0f ? -INFINITY : (state.row_max[half] * scale.to_log2 + __log2f(sum)) * kLn2;
  }
  rescale<Traits>(o, inverse);
}

}  // namespace flash::v3
