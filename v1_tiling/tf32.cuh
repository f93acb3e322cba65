// fp32 products from tf32 matrix instructions: three products, and sums that round but seldom.
#pragma once

#include "common/ptx.cuh"

namespace flash::v1 {

// An fp32 fragment as the sum of two tf32 fragments, but for its last two or three bits: its
// leading bits, and what they leave with half a bit more, since matrix instructions cut that to
// tf32, too.
template <int kSize>
struct Split {
  uint32_t high[kSize], low[kSize];

  __device__ __forceinline__ explicit Split(const uint32_t (&x)[kSize]) {
    constexpr float kHalfBitMore = 1.0f + 0x1p-22f;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      high[i] = x[i] & 0xffffe000u;
      low[i] =
          __float_as_uint(fmaf(__uint_as_float(x[i]), kHalfBitMore, -__uint_as_float(high[i])));
    }
  }
};

// Matrix instructions cut the sum where fp32 would round it, so a long chain of them drifts towards
// zero. Hence short chains, each begun from zero: one for the leading products, one for the rest,
// whose cuts do not count; total() rounds. The product of two low parts is below the last bit.
template <int kTiles>
struct Tf32Sums {
  float leading[kTiles][4] = {}, rest[kTiles][4] = {};

  // Tile n gets A (16, 8) times B (8, 8); b0[n] and b1[n] hold its upper and lower four rows of B.
  // Neighbours in the stream of instructions are independent.
  __device__ __forceinline__ void add(const Split<4>& a, const Split<kTiles>& b0,
                                      const Split<kTiles>& b1) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_m16n8k8_tf32(rest[n], a.low, b0.high[n], b1.high[n]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_m16n8k8_tf32(leading[n], a.high, b0.high[n], b1.high[n]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_m16n8k8_tf32(rest[n], a.high, b0.low[n], b1.low[n]);
  }
  __device__ __forceinline__ float total(int n, int e) const { return leading[n][e] + rest[n][e]; }
};

}  // namespace flash::v1
