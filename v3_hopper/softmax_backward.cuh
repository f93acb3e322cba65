// P and dS of one tile, transposed: accumulators hold keys as rows and query rows as columns.
#pragma once

#include "common/mask.cuh"
#include "common/ptx.cuh"
#include "v3_hopper/traits_backward.cuh"

namespace flash::v3 {

inline constexpr float kLog2E = 1.4426950408889634f;

// What turns scores into probabilities: P = exp2(S * scale - LSE), or with tanh in between.
struct Exponent {
  float scale;  // of S, into base 2; with softcap: of tanh, into base 2
  float inner;  // softcap only: of S, into the argument of 2^x inside tanh

  __device__ __forceinline__ explicit Exponent(const Problem& p)
      : scale((p.softcap > 0.0f ? p.softcap : p.scale) * kLog2E),
        inner(p.softcap > 0.0f ? 2.0f * kLog2E * p.scale / p.softcap : 0.0f) {}
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

// S -> -inf where the row does not see the key. Only boundary blocks come here.
template <int N>
__device__ __forceinline__ void mask(float (&s)[N], const Sequence& sequence, Position at) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int key = at.key + 8 * (i / 2 % 2);
    if (!sequence.visible(at.row + 8 * (i / 4) + i % 2, key)) s[i] = -INFINITY;
  }
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
    const float2 shift = *reinterpret_cast<const float2*>(lse + 2 * i);
#pragma unroll
    for (int j = i; j < i + 4; ++j) {
      p[j] = fast_exp2(s[j] * scale - (j % 2 == 0 ? shift.x : shift.y));
      s[j] = kSoftcap ? p[j] * fmaxf(1.0f - s[j] * s[j], 0.0f) : p[j];
    }
  }
}

// Accumulators rounded to an operand.
template <class Element, int N>
__device__ __forceinline__ void round_operand(uint32_t (&r)[N / 2], const float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 2) r[i / 2] = pack<Element>(x[i], x[i + 1]);
}

// dP starts at -delta, so that the product leaves dP - delta.
template <int N>
__device__ __forceinline__ void start_gradient(float (&dp)[N], const float* delta) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float2 shift = *reinterpret_cast<const float2*>(delta + 2 * i);
    dp[i] = dp[i + 2] = shift.x;
    dp[i + 1] = dp[i + 3] = shift.y;
  }
}

// dP -> dS = P (dP - delta).
template <int N>
__device__ __forceinline__ void score_gradient(float (&dp)[N], const float (&p)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) dp[i] *= p[i];
}

}  // namespace flash::v3
