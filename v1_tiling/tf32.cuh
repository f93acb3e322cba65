// fp32 products from tf32 matrix instructions: three products, and sums that round but seldom.
#pragma once

#include "common/ptx.cuh"

namespace flash::v1 {

// An fp32 fragment is the sum of two tf32 fragments, but for its last two or three bits: its
// leading bits, rounded to nearest, and what is left.
template <int kSize>
struct Split {
  uint32_t high[kSize], low[kSize];

  __device__ __forceinline__ explicit Split(const uint32_t (&x)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      high[i] = (x[i] + 0x1000u) & 0xffffe000u;
      low[i] = __float_as_uint(__uint_as_float(x[i]) - __uint_as_float(high[i]));
    }
  }
};

// Matrix instructions cut the sum where fp32 would round it, so a long chain of them drifts towards
// zero. Hence short chains, each begun from zero: one for the leading products, one for the rest,
// whose cuts do not count; total() rounds. The product of two low parts is below the last bit.
struct Tf32Sum {
  float leading[4] = {}, rest[4] = {};

  __device__ __forceinline__ void add(const Split<4>& a, const Split<4>& b, int half) {
    mma_m16n8k8_tf32(rest, a.low, b.high[2 * half], b.high[2 * half + 1]);
    mma_m16n8k8_tf32(rest, a.high, b.low[2 * half], b.low[2 * half + 1]);
    mma_m16n8k8_tf32(leading, a.high, b.high[2 * half], b.high[2 * half + 1]);
  }
  __device__ __forceinline__ float total(int e) const { return leading[e] + rest[e]; }
};

}  // namespace flash::v1
