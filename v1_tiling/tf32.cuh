// fp32 products from tf32 matrix instructions: three products, and sums that round but seldom.
#pragma once

#include "common/ptx.cuh"

namespace flash::v1 {

// An fp32 fragment as the sum of two tf32 fragments, but for its last two or three bits: matrix
// instructions cut `high` to its leading bits themselves; `low` is what that leaves, and half a bit
// more, since they will cut it too.
template <int kSize>
struct Split {
  uint32_t high[kSize], low[kSize];

  __device__ __forceinline__ explicit Split(const uint32_t (&x)[kSize]) {
    constexpr float kHalfBitMore = 1.0f + 0x1p-22f;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      high[i] = x[i];
      const float leading = __uint_as_float(x[i] & 0xffffe000u);
      low[i] = __float_as_uint(fmaf(__uint_as_float(x[i]), kHalfBitMore, -leading));
    }
  }
};

// Matrix instructions cut the sum where fp32 would round it, so a long chain of them drifts towards
// zero. Hence short chains, each begun from zero: one for the leading products, one for the rest,
// whose cuts do not count; total() rounds. The product of two low parts is below the last bit.
struct Tf32Sum {
  float leading[4] = {}, rest[4] = {};

  __device__ __forceinline__ void add(const Split<4>& a, uint32_t high0, uint32_t high1,
                                      uint32_t low0, uint32_t low1) {
    mma_m16n8k8_tf32(rest, a.low, high0, high1);
    mma_m16n8k8_tf32(rest, a.high, low0, low1);
    mma_m16n8k8_tf32(leading, a.high, high0, high1);
  }
  __device__ __forceinline__ float total(int e) const { return leading[e] + rest[e]; }
};

}  // namespace flash::v1
