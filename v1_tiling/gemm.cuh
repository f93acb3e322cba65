// S = Q K^T and O += P V by matrix instructions, fragments straight from shared memory.
#pragma once

#include "v1_tiling/schedule.cuh"

namespace flash::v1 {

// D (16, 8) += A (16, kDepth) B (kDepth, 8).
template <class Element>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  mma_m16n8k16<Element>(d, a, b0, b1);
}

// An fp32 value is the sum of two tf32 values but for its last two or three bits: its leading part,
// rounded to nearest, and what is left.
struct Split {
  uint32_t high, low;

  __device__ __forceinline__ explicit Split(uint32_t x) {
    high = (x + 0x1000u) & 0xffffe000u;
    low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
  }
};

// fp32 from three tf32 products; that of the two low parts would be below the last bit.
template <>
__device__ __forceinline__ void mma<fp32>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  const Split a0(a[0]), a1(a[1]), a2(a[2]), a3(a[3]), split_b0(b0), split_b1(b1);
  const uint32_t high[4] = {a0.high, a1.high, a2.high, a3.high};
  const uint32_t low[4] = {a0.low, a1.low, a2.low, a3.low};
  mma_m16n8k8_tf32(d, low, split_b0.high, split_b1.high);
  mma_m16n8k8_tf32(d, high, split_b0.low, split_b1.low);
  mma_m16n8k8_tf32(d, high, split_b0.high, split_b1.high);
}

// The rows of Q that one warp owns: in registers for the whole loop when they fit, else read
// from shared memory as they are needed.
template <class Traits>
struct Query {
  static constexpr bool kKept = Traits::kQueryInRegisters;
  using Rows = typename Traits::Rows;
  uint32_t address;
  uint32_t kept[kKept ? Traits::kStepsQK : 1][Traits::kTilesQ][4];

  __device__ __forceinline__ explicit Query(Shared<Traits>& smem) {
    const int lane = threadIdx.x % 32;
    address = smem.q() + Rows::offset(lane % 16, lane / 16);
  }

  // Call once, when Q is visible.
  __device__ __forceinline__ void keep() {
    if constexpr (kKept) {
#pragma unroll
      for (int step = 0; step < Traits::kStepsQK; ++step) read(kept[step], step);
    }
  }

  __device__ __forceinline__ void fetch(uint32_t (&rQ)[Traits::kTilesQ][4], int step) const {
    if constexpr (kKept) {
#pragma unroll
      for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) rQ[m][i] = kept[step][m][i];
      }
    } else {
      read(rQ, step);
    }
  }

 private:
  __device__ __forceinline__ void read(uint32_t (&rQ)[Traits::kTilesQ][4], int step) const {
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
      ldmatrix_x4(rQ[m], Rows::advance(address, 2 * step) + m * 16 * Rows::kRowBytes);
    }
  }
};

// S = Q K_j^T, not scaled.
template <class Traits>
__device__ __forceinline__ void gemm_qk(typename Traits::Scores& S, const Query<Traits>& Q,
                                        Shared<Traits>& smem, int j) {
  using Rows = typename Traits::Rows;
  const int lane = threadIdx.x % 32;
  const uint32_t sK = smem.k(j) + Rows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kTilesKV; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) S[m][n][e] = 0.0f;
    }
  }
#pragma unroll
  for (int step = 0; step < Traits::kStepsQK; ++step) {
    uint32_t rQ[Traits::kTilesQ][4];       // (kRowsPerWarp, kDepth)
    uint32_t rK[Traits::kTilesKV / 2][4];  // (kBlockKV, kDepth)
    Q.fetch(rQ, step);
#pragma unroll
    for (int n = 0; n < Traits::kTilesKV / 2; ++n) {
      ldmatrix_x4(rK[n], Rows::advance(sK, 2 * step) + n * 16 * Rows::kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < Traits::kTilesKV; ++n) {
#pragma unroll
      for (int m = 0; m < Traits::kTilesQ; ++m) {
        mma<typename Traits::Element>(S[m][n], rQ[m], rK[n / 2][n % 2 * 2],
                                      rK[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
}

// P as the left operand of step k: its accumulators already lie where the product wants them.
template <class Traits>
__device__ __forceinline__ void fetch_p(uint32_t (&rP)[4], const float (&P)[Traits::kTilesKV][4],
                                        int step) {
  using Element = typename Traits::Element;
  if constexpr (Traits::kFloat32) {
    // Column t of the left operand is key 2 t, column t + 4 is key 2 t + 1.
    rP[0] = __float_as_uint(P[step][0]), rP[1] = __float_as_uint(P[step][2]);
    rP[2] = __float_as_uint(P[step][1]), rP[3] = __float_as_uint(P[step][3]);
  } else {
    const auto &left = P[2 * step], &right = P[2 * step + 1];
    rP[0] = pack<Element>(left[0], left[1]), rP[1] = pack<Element>(left[2], left[3]);
    rP[2] = pack<Element>(right[0], right[1]), rP[3] = pack<Element>(right[2], right[3]);
  }
}

// This lane's address for V fragments: keys [0, kDepth), columns [0, 16).
template <class Traits>
__device__ __forceinline__ uint32_t value_address(uint32_t sV) {
  using Rows = typename Traits::Rows;
  const int lane = threadIdx.x % 32;
  if constexpr (Traits::kFloat32) {
    return sV + Rows::offset(lane % 4 * 2, lane / 16) + lane / 4 % 4 * 4;
  } else {
    return sV + Rows::offset(lane % 16, lane / 16);
  }
}

// (kDepth keys, 16 columns) of V as the right operand of two products.
template <class Traits>
__device__ __forceinline__ void fetch_v(uint32_t (&rV)[4], uint32_t base, int step, int n) {
  using Rows = typename Traits::Rows;
  if constexpr (Traits::kFloat32) {
    // Keys 2 t and 2 t + 1, in the order that fetch_p() gives the keys.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t even = Rows::advance(base, 4 * n + 2 * half) + step * 8 * Rows::kRowBytes;
      rV[2 * half] = load_shared_4(even);
      rV[2 * half + 1] = load_shared_4((even ^ 16) + Rows::kRowBytes);
    }
  } else {
    ldmatrix_x4_trans(rV, Rows::advance(base, 2 * n) + step * 16 * Rows::kRowBytes);
  }
}

// O += P V_j. The accumulator layout of S is the operand layout of P: it never leaves registers.
template <class Traits>
__device__ __forceinline__ void gemm_pv(typename Traits::Output& O,
                                        const typename Traits::Scores& P, Shared<Traits>& smem,
                                        int j) {
  using Element = typename Traits::Element;
  const uint32_t sV = value_address<Traits>(smem.v(j));
#pragma unroll
  for (int step = 0; step < Traits::kStepsPV; ++step) {
    uint32_t rP[Traits::kTilesQ][4];  // (kRowsPerWarp, kDepth)
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) fetch_p<Traits>(rP[m], P[m], step);
#pragma unroll
    for (int n = 0; n < Traits::kTilesV / 2; ++n) {
      uint32_t rV[4];  // (kDepth, 16)
      fetch_v<Traits>(rV, sV, step, n);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int m = 0; m < Traits::kTilesQ; ++m) {
          mma<Element>(O[m][2 * n + half], rP[m], rV[2 * half], rV[2 * half + 1]);
        }
      }
    }
  }
}

}  // namespace flash::v1
