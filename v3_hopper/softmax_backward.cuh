// P and dS of one tile, transposed: accumulators hold keys as rows and query rows as columns.
#pragma once

#include "common/mask.cuh"
#include "common/ptx.cuh"
#include "v3_hopper/traits_backward.cuh"

namespace flash::v3 {

inline constexpr float kLog2E = 1.4426950408889634f;

// What turns scores into probabilities. The product of Q and K starts at -LSE / scale, so that
// P = exp2(S * scale); with softcap it starts at 0, and P = exp2(tanh(S * inner) * scale - LSE).
struct Exponent {
  float scale;
  float inner = 0.0f;  // 2 log2(e) / softcap, for tanh by 2^x

  __device__ __forceinline__ explicit Exponent(const Problem& p) : scale(start_scale(p) * kLog2E) {
    if (p.softcap <= 0.0f) return;
    scale = p.softcap * kLog2E;
    inner = 2.0f * kLog2E * p.scale / p.softcap;
  }

  // What a score becomes that must not count, either sign of the scale.
  __device__ __forceinline__ float hidden() const { return copysignf(INFINITY, -scale); }

  // The scale, kept away from 0 so that LSE / scale is finite; P is the same.
  __device__ __forceinline__ static float start_scale(const Problem& p) {
    return copysignf(fmaxf(fabsf(p.scale), 1e-30f), p.scale);
  }
};

// tanh(x) of 2^(2 x log2 e): exact to fp32 in absolute terms, safe for any argument.
__device__ __forceinline__ float tanh_of_exp2(float argument) {
  return 1.0f - __fdividef(2.0f, 1.0f + fast_exp2(argument));
}

// Where a thread's accumulators lie: element i is at this key + 8 * (i / 2 % 2) and this row
// + 8 * (i / 4) + i % 2.
struct Position {
  int key, row;
};

// S -> hidden where the row does not see the key. Only boundary blocks come here.
template <int N>
__device__ __forceinline__ void mask(float (&s)[N], const Sequence& sequence, Position at,
                                     float hidden) {
  // Rows from at.row on that see at.key, and keys behind the last: elements meet constants then.
  const int least = at.key - sequence.last - at.row;
  const int most = at.key - sequence.first - at.row;
  const int behind = at.key - sequence.seqlen_k;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int low = behind + 8 * half < 0 ? least + 8 * half : 2 * N;
    const int high = most + 8 * half;
#pragma unroll
    for (int i = 2 * half; i < N; i += 4) {
      if (8 * (i / 4) < low || 8 * (i / 4) > high) s[i] = hidden;
      if (8 * (i / 4) + 1 < low || 8 * (i / 4) + 1 > high) s[i + 1] = hidden;
    }
  }
}

// Where all rows see all keys but those behind the last: S -> hidden for these.
template <int N>
__device__ __forceinline__ void mask_end(float (&s)[N], const Sequence& sequence, Position at,
                                         float hidden) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (at.key + 8 * half < sequence.seqlen_k) continue;
#pragma unroll
    for (int i = 2 * half; i < N; i += 4) s[i] = s[i + 1] = hidden;
  }
}

// Is a score that will be masked NaN or infinite? Then its key may be, which dQ would spread. Not
// behind the last row and key: such rows are not stored, such keys are zero.
template <int N>
__device__ __forceinline__ bool hides_non_finite(const float (&s)[N], const Sequence& sequence,
                                                 Position at) {
  bool found = false;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int key = at.key + 8 * (i / 2 % 2);
    const int row = at.row + 8 * (i / 4) + i % 2;
    found |= !(key >= row + sequence.first && key <= row + sequence.last) &&
             row < sequence.seqlen_q && !(fabsf(s[i]) < INFINITY);
  }
  return found;
}

// dP -> 0 where P is 0, so that nothing of an invisible V gets into dS.
template <int N>
__device__ __forceinline__ void mask_gradient(float (&dp)[N], const float (&p)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (p[i] == 0.0f) dp[i] = 0.0f;
  }
}

// S -> tanh, the argument of the cap.
template <int N>
__device__ __forceinline__ void cap_scores(float (&s)[N], const Exponent& exponent) {
#pragma unroll
  for (int i = 0; i < N; ++i) s[i] = tanh_of_exp2(s[i] * exponent.inner);
}

// S -> P, in fp32. With softcap s holds tanh and becomes P times the derivative of the cap.
template <bool kSoftcap, int N>
__device__ __forceinline__ void probabilities(float (&s)[N], float (&p)[N], const float* lse,
                                              float scale) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    float2 shift = {0.0f, 0.0f};
    if constexpr (kSoftcap) shift = *reinterpret_cast<const float2*>(lse + 2 * i);
#pragma unroll
    for (int j = i; j < i + 4; ++j) {
      p[j] = fast_exp2(s[j] * scale + (j % 2 == 0 ? shift.x : shift.y));
      s[j] = kSoftcap ? p[j] * fmaxf(1.0f - s[j] * s[j], 0.0f) : p[j];
    }
  }
}

// Accumulators rounded to an operand.
template <class Element, int N>
__device__ __forceinline__ void round_operand(uint32_t (&r)[N / 2], const float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 2) r[i / 2] = flash::pack<Element>(x[i], x[i + 1]);
}

// A product starts at the negated statistic of its rows: S at -LSE / scale, dP at -delta. Here and
// below, of elements from `begin` to `end`.
template <int N>
__device__ __forceinline__ void start(float (&d)[N], const float* statistic, int begin = 0,
                                      int end = N) {
#pragma unroll
  for (int i = begin; i < end; i += 4) {
    const float2 shift = *reinterpret_cast<const float2*>(statistic + 2 * i);
    d[i] = d[i + 2] = shift.x;
    d[i + 1] = d[i + 3] = shift.y;
  }
}

// dP -> dS = P (dP - delta).
template <int N>
__device__ __forceinline__ void score_gradient(float (&dp)[N], const float (&p)[N], int begin = 0,
                                               int end = N) {
#pragma unroll
  for (int i = begin; i < end; ++i) dp[i] *= p[i];
}

}  // namespace flash::v3
