// Random signs and the Hadamard matrix over a line of 32, 64, 128 or 256 elements: sixteen elements
// at a time on the tensor cores, the rest in registers.
#pragma once

#include "common/dispatch.h"
#include "common/ptx.cuh"

namespace flash::v3::fp8 {

// A warp's share of a tile is 16 rows of an MMA, each of 4 units of 8 neighbouring elements for
// each of a quad's threads. A thread has 2 of the rows.
constexpr int kWarp = 32, kHalves = 2, kUnits = 4, kUnit = 8;
template <int kDim>
constexpr int kWarpLines = kWarp * kHalves * kUnits * kUnit / kDim;
using Share = float[kHalves][kUnits][kUnit];

// Where in a warp's share a thread's unit lies: pairs of units are neighbours in a line.
template <int kDim>
struct Spot {
  int line, unit;

  __device__ __forceinline__ Spot(int half, int k) {
    const int lane = threadIdx.x % kWarp;
    line = lane / 4 + (kDim < 256 ? half * 8 : 0) + (kDim == 64 ? k / 2 * 16 : 0);
    unit = lane % 4 * 2 + k % 2 + (kDim > 64 ? k / 2 * 8 : 0) + (kDim == 256 ? half * 16 : 0);
    if constexpr (kDim == 32) {  // a line has one unit in each of a quad's threads
      line += k * 16;
      unit = lane % 4;
    }
  }
};

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

// The Hadamard matrix of 16 as the second operand: an index is a thread of a quad and one of four
// neighbouring elements, as these lie in a row of the first operand and of the result.
template <class T>
struct Hadamard16 {
  uint32_t b[2][2];  // columns 0 to 7 and 8 to 15; rows 0 to 7 and 8 to 15

  __device__ __forceinline__ Hadamard16() {
    constexpr uint32_t kOnes = kDType<T> == DType::kBFloat16 ? 0x3f803f80u : 0x3c003c00u;
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane % 4 * 4 + i % 2 * 2, column = lane / 8 * 4 + lane / 4 % 2 + i / 2 * 2;
      const uint32_t first = __popc(row & column) & 1, second = __popc((row + 1) & column) & 1;
      b[i / 2][i % 2] = kOnes ^ (first << 15 | second << 31);
    }
  }
};

// One step of the transform: (a, b) -> (a + b, a - b).
__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float sum = a + b, difference = a - b;
  a = sum;
  b = difference;
}

// x H: bits 0, 1, 4 and 5 of the index at once, then bits 2, 3, 6 and 7, each in fp32. Of a line of
// 32: bits 0, 1, 3 and 4, then bit 2.
template <int kDim, class T>
__device__ __forceinline__ void rotate(Share& x, const uint4 (&packed)[kHalves][kUnits],
                                       const Hadamard16<T>& hadamard) {
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    const uint4 &top = packed[0][k], &bottom = packed[1][k];
    const uint32_t a[2][4] = {{top.x, bottom.x, top.y, bottom.y},
                              {top.z, bottom.z, top.w, bottom.w}};
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      float d[4] = {};
      const uint32_t (&b)[2] = hadamard.b[part % 2];
      mma_m16n8k16<T>(d, a[part / 2], b[0], b[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i / 2][k][part * 2 + i % 2] = d[i];
    }
  }
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        if (i < 4) butterfly(x[half][k][i], x[half][k][i + 4]);
      }
    }
    if constexpr (kDim > 32) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        butterfly(x[half][0][i], x[half][1][i]);
        butterfly(x[half][2][i], x[half][3][i]);
        if constexpr (kDim > 64) {
          butterfly(x[half][0][i], x[half][2][i]);
          butterfly(x[half][1][i], x[half][3][i]);
        }
      }
    }
  }
  if constexpr (kDim == 256) {
#pragma unroll
    for (int i = 0; i < kUnits * kUnit; ++i) {
      butterfly(x[0][i / kUnit][i % kUnit], x[1][i / kUnit][i % kUnit]);
    }
  }
}

}  // namespace flash::v3::fp8
