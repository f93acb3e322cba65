// Random signs and the Hadamard matrix over a line of 64, 128 or 256 elements in registers.
#pragma once

#include "common/dispatch.h"

namespace flash::v3::fp8 {

constexpr int kWarp = 32;
constexpr int kUnits = 4, kUnit = 8;  // a thread holds 4 times 8 neighbouring elements of a line
template <int kDim>
constexpr int kLanes = kDim / (kUnits * kUnit);  // threads that share a line

// The random signs of 256 dimensions, the same on every machine: of pairs of 16-bit elements, the
// sign bits that are turned.
struct Signs {
  uint32_t turned[128];
};
constexpr Signs random_signs() {
  Signs signs = {};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t h = (i + 1) * 0x9E3779B9u;
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    if (((h ^ h >> 16) & 1) == 0) signs.turned[i / 2] |= 0x8000u << i % 2 * 16;
  }
  return signs;
}
__constant__ Signs kSigns = random_signs();

using Line = float[kUnits][kUnit];

template <class T>
__device__ __forceinline__ void unpack(float (&x)[kUnit], const uint4& packed) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kDType<T> == DType::kBFloat16) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

// One step of the transform: (a, b) -> (a + b, a - b).
__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float sum = a + b, difference = a - b;
  a = sum;
  b = difference;
}

// x H / sqrt(dim), the signs already turned; steps 1, 2, 4, ... in this order, which fixes every
// rounding.
template <int kDim>
__device__ __forceinline__ void rotate(Line& x, int lane) {
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
    for (int step = 1; step < kUnit; step *= 2) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if ((i & step) == 0) butterfly(x[unit][i], x[unit][i + step]);
      }
    }
#pragma unroll
    for (int step = 1; step < kLanes<kDim>; step *= 2) {
      const float own = lane & step ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        x[unit][i] = fmaf(x[unit][i], own, __shfl_xor_sync(~0u, x[unit][i], step));
      }
    }
  }
  constexpr float kNorm = kDim == 64 ? 0.125f : kDim == 256 ? 0.0625f : 0.08838834764831845f;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    butterfly(x[0][i], x[1][i]);
    butterfly(x[2][i], x[3][i]);
    butterfly(x[0][i], x[2][i]);
    butterfly(x[1][i], x[3][i]);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) x[unit][i] *= kNorm;
  }
}

}  // namespace flash::v3::fp8
