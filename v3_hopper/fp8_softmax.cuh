// The online softmax in FP8: scores have a scale per block, P lies in e4m3's range, and every
// block's P V is promoted into O in fp32.
#pragma once

#include "v3_hopper/fp8_traits.cuh"
#include "v3_hopper/softmax.cuh"

namespace flash::v3::fp8 {

// P = 2^7 exp(S - reference), which e4m3 holds as long as a score exceeds its reference by no more
// than the slack: 2^8.8 = 446 of 448.
inline constexpr float kLiftLog2 = 7.0f, kSlackLog2 = 1.8f;

// A thread holds parts of two rows, 8 apart; the four threads of a quad share them. Lean: O is
// taken to a new reference at once, and even threads have the sum of the first row, odd ones that
// of the second.
template <bool kLean>
struct RowState {
  float row_max[2];  // reference of the exponentials: of the scaled scores, times log2(e)
  float row_sum[kLean ? 1 : 2];     // of P as rounded
  float correction[kLean ? 1 : 2];  // takes O to the new reference and to units of the new V

  __device__ __forceinline__ static float pick(float first, float second) {
    return threadIdx.x % 2 ? second : first;
  }
};

// Softcap and scales that are not positive; afterwards S is a score times log2(e).
template <class Traits>
__device__ __forceinline__ void feature(float (&s)[Traits::kBlockKV / 2], float softcap,
                                        float factor) {
  const bool cap = softcap > 0.0f;
  const float to_tanh = 2.0f / softcap;
#pragma unroll
  for (int i = 0; i < Traits::kBlockKV / 2; ++i) {
    s[i] *= factor;
    // tanh(y) = 1 - 2 / (1 + exp(2 y))
    if (cap) {
      const float twice = softcap * kLog2E * 2.0f;
      s[i] = 0.5f * twice - __fdividef(twice, 1.0f + fast_exp2(s[i] * to_tanh));
    }
  }
}

// Raises the references where a score, S * to_log2, exceeds them by the slack, which is rare. What
// was summed before has to be multiplied by the correction; lean: it has been. A row depends on its
// own scores alone, so that its bits are the same whatever its neighbours are.
template <class Traits>
__device__ __forceinline__ void update(const float (&s)[Traits::kBlockKV / 2],
                                       RowState<Traits::kLean>& state,
                                       float (&o)[Traits::kHeadDimV / 2], float to_log2) {
  float chain[2][2] = {{s[0], s[1]}, {s[2], s[3]}};  // two for each row
#pragma unroll
  for (int i = 4; i < Traits::kBlockKV / 2; ++i) {
    chain[i / 2 % 2][i % 2] = fmaxf(chain[i / 2 % 2][i % 2], s[i]);
  }
  float highest[2];
  bool risen = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    highest[half] = fmaxf(chain[half][0], chain[half][1]) * to_log2;
    risen |= highest[half] > state.row_max[half] + kSlackLog2;
    if constexpr (!Traits::kLean) state.correction[half] = 1.0f;
  }
  if (!__any_sync(~0u, risen)) return;
  float correction[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& found = highest[half];
    found = fmaxf(found, __shfl_xor_sync(~0u, found, 1));
    found = fmaxf(found, __shfl_xor_sync(~0u, found, 2));
    if (!(found > state.row_max[half] + kSlackLog2)) found = state.row_max[half];
    correction[half] = fast_exp2(state.row_max[half] - (found == -INFINITY ? 0.0f : found));
    state.row_max[half] = found;
  }
  if constexpr (Traits::kLean) {
    state.row_sum[0] *= state.pick(correction[0], correction[1]);
    rescale<Traits>(o, correction);
  } else {
    state.correction[0] = correction[0];
    state.correction[1] = correction[1];
  }
}

// Makes the correction what takes O to units of the new block of V, too.
template <bool kLean>
__device__ __forceinline__ void change_units(RowState<kLean>& state, float v_ratio) {
  if constexpr (kLean) {
    state.correction[0] = v_ratio;
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.row_sum[half] *= state.correction[half];
      state.correction[half] *= v_ratio;
    }
  }
}

// Adds what the columns behind V hold of the two rows.
template <bool kLean>
__device__ __forceinline__ void add_sums(RowState<kLean>& state, float first, float second) {
  if constexpr (kLean) {
    state.row_sum[0] += state.pick(first, second);
  } else {
    state.row_sum[0] += first;
    state.row_sum[1] += second;
  }
}

// Four values of one row as e4m3, the first in the lowest byte.
__device__ __forceinline__ uint32_t pack_four(float a, float b, float c, float d) {
  uint32_t packed;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}\n"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

// Which accumulators of a row, `first` and the next, `second` and the next, are a thread's four
// keys number `group`: two groups of 8 columns that are neighbours, or, where K's rows lie in
// another order, that are half a block apart.
template <class Traits>
struct KeyOrder {
  static constexpr int kGroup = Traits::kKeysContiguous ? 4 : 8;
  static constexpr int kSecond = Traits::kKeysContiguous ? Traits::kBlockKV / 4 : 4;
};

// Of a thread's keys 0 to 3, 16 to 19, 32 to 35, ... those below `end`, one bit each.
__device__ __forceinline__ uint32_t keys_below(int end) {
  const int inside = max(end, 0), count = inside / 16 * 4 + min(inside % 16, 4);
  return count == 0 ? 0u : ~0u >> (32 - min(count, 32));
}

// Scores that a row must not see become -inf. `row` is the first of this thread's two rows.
template <class Traits>
__device__ __forceinline__ void hide(float (&s)[Traits::kBlockKV / 2], const Sequence& sequence,
                                     int row, int key) {
  if constexpr (!Traits::kKeysContiguous) {
    mask<Traits>(s, sequence, row, key);
  } else {
    const int first_key = key + threadIdx.x % 4 * 4;  // and the three behind it, of each 16
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Bit i: key i % 4 of the 16 number i / 4.
      const uint32_t from = keys_below(row + 8 * half + sequence.first - first_key);
      const int last = min(row + 8 * half + sequence.last, sequence.seqlen_k - 1);
      const uint32_t visible = keys_below(last + 1 - first_key) & ~from;
#pragma unroll
      for (int i = 0; i < Traits::kBlockKV / 4; ++i) {
        const int at = i / 4 * KeyOrder<Traits>::kGroup + i % 4 / 2 * KeyOrder<Traits>::kSecond;
        float& score = s[at + half * 2 + i % 2];
        score = visible >> i & 1 ? score : -INFINITY;
      }
    }
  }
}

// P as a register operand: 16 accumulators become one slab of 32 keys.
template <class Traits>
__device__ __forceinline__ void exponentials(uint32_t (&p)[Traits::kBlockKV / 8],
                                             float (&s)[Traits::kBlockKV / 2],
                                             const RowState<Traits::kLean>& state, float to_log2) {
  float offset[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    offset[half] = (state.row_max[half] == -INFINITY ? 0.0f : state.row_max[half]) - kLiftLog2;
  }
#pragma unroll
  for (int i = 0; i < Traits::kBlockKV / 2; ++i) {
    s[i] = fast_exp2(fmaf(s[i], to_log2, -offset[i / 2 % 2]));
  }
#pragma unroll
  for (int i = 0; i < Traits::kBlockKV / 8; ++i) {
    const int first = i / 2 * KeyOrder<Traits>::kGroup + i % 2 * 2;  // of one row
    const int second = first + KeyOrder<Traits>::kSecond;
    p[i] = pack_four(s[first], s[first + 1], s[second], s[second + 1]);
  }
}

// O = O * correction + P V: the second level of accumulation. Columns from kFirst on.
template <int kFirst, int kColumns, int kAll, int kPart, int kRows>
__device__ __forceinline__ void promote(float (&o)[kAll], const float (&part)[kPart],
                                        const float (&correction)[kRows]) {
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    o[kFirst / 2 + i] = fmaf(o[kFirst / 2 + i], correction[i / 2 % kRows], part[i]);
  }
}

// O / row_sum; lse becomes the natural log-sum-exp, -inf for a row that saw nothing.
template <class Traits>
__device__ __forceinline__ void normalize(float (&o)[Traits::kHeadDimV / 2],
                                          RowState<Traits::kLean>& state, float (&lse)[2],
                                          float units) {
  constexpr float kLn2 = 0.6931471805599453f;
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int owner = (threadIdx.x % kWarp & ~3) + (Traits::kLean ? half : 0);
    const float sum = __shfl_sync(~0u, state.row_sum[Traits::kLean ? 0 : half], owner);
    inverse[half] = sum == 0.0f ? 0.0f : __fdividef(units, sum);
    lse[half] = sum == 0.0f ? -INFINITY : (state.row_max[half] - kLiftLog2 + __log2f(sum)) * kLn2;
  }
  rescale<Traits>(o, inverse);
}

}  // namespace flash::v3::fp8
