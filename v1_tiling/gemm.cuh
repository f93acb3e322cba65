// S = Q K^T and O += P V by matrix instructions, fragments straight from shared memory.
#pragma once

#include "v1_tiling/schedule.cuh"
#include "v1_tiling/tf32.cuh"

namespace flash::v1 {

// Elements that are NaN or infinite become 0.
template <class Element>
__device__ __forceinline__ void clear_non_finite(uint32_t (&r)[4]) {
  constexpr uint32_t kBits = kExponentBits<Element>;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 4) {
      if ((r[i] & kBits) == kBits) r[i] = 0;
    } else {
      if ((r[i] & kBits) == kBits) r[i] &= 0xffff0000u;
      if ((r[i] >> 16 & kBits) == kBits) r[i] &= 0x0000ffffu;
    }
  }
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
    const uint32_t here = opaque(address);
#pragma unroll
    for (int m = 0; m < Traits::kTilesQ; ++m) {
      ldmatrix_x4(rQ[m], Rows::advance(here, 2 * step) + m * 16 * Rows::kRowBytes);
    }
  }
};

// S = Q K_j^T of fp32 elements.
template <class Traits>
__device__ __forceinline__ void gemm_qk_fp32(typename Traits::Scores& S, const Query<Traits>& Q,
                                             uint32_t sK) {
  using Rows = typename Traits::Rows;
  Tf32Sum sums[Traits::kTilesKV];
#pragma unroll
  for (int step = 0; step < Traits::kStepsQK; ++step) {
    uint32_t rQ[1][4];  // (kRowsPerWarp, kDepth)
    Q.fetch(rQ, step);
    const Split<4> a(rQ[0]);
#pragma unroll
    for (int n = 0; n < Traits::kTilesKV / 2; ++n) {
      uint32_t rK[4];  // (16, kDepth)
      ldmatrix_x4(rK, Rows::advance(sK, 2 * step) + n * 16 * Rows::kRowBytes);
      const Split<4> b(rK);
#pragma unroll
      for (int half = 0; half < 2; ++half) sums[2 * n + half].add(a, b, half);
    }
  }
#pragma unroll
  for (int n = 0; n < Traits::kTilesKV; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) S[0][n][e] = sums[n].total(e);
  }
}

// S = Q K_j^T, not scaled.
template <class Traits>
__device__ __forceinline__ void gemm_qk(typename Traits::Scores& S, const Query<Traits>& Q,
                                        Shared<Traits>& smem, int j) {
  using Rows = typename Traits::Rows;
  const int lane = threadIdx.x % 32;
  const uint32_t sK = smem.k(j) + Rows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  if constexpr (Traits::kFloat32) return gemm_qk_fp32<Traits>(S, Q, sK);
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
        mma_m16n8k16<typename Traits::Element>(S[m][n], rQ[m], rK[n / 2][n % 2 * 2],
                                               rK[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
}

// O += P V_j of fp32 elements. Summed dimensions may be permuted: column t of a P fragment is key
// 2 t and column t + 4 is key 2 t + 1, as the accumulators hold them.
template <class Traits, bool kClean>
__device__ __forceinline__ void gemm_pv_fp32(typename Traits::Output& O,
                                             const typename Traits::Scores& P, uint32_t sV) {
  using Rows = typename Traits::Rows;
  const int lane = threadIdx.x % 32;
  // Key 2 t of lane 4 g + t, column g: chunk g / 4.
  const uint32_t even = sV + Rows::offset(lane % 4 * 2, lane / 16) + lane / 4 % 4 * 4;
#pragma unroll
  for (int n = 0; n < Traits::kTilesV / 2; ++n) {
    Tf32Sum sums[2];
#pragma unroll
    for (int step = 0; step < Traits::kStepsPV; ++step) {
      const float (&p)[4] = P[0][step];
      const uint32_t rP[4] = {__float_as_uint(p[0]), __float_as_uint(p[2]), __float_as_uint(p[1]),
                              __float_as_uint(p[3])};  // (kRowsPerWarp, kDepth)
      uint32_t rV[4];                                  // (kDepth, 16)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t from =
            Rows::advance(even, 4 * n + 2 * half) + step * Traits::kDepth * Rows::kRowBytes;
        rV[2 * half] = load_shared_4(from);
        rV[2 * half + 1] = load_shared_4((from ^ 16) + Rows::kRowBytes);
      }
      if constexpr (kClean) clear_non_finite<fp32>(rV);
      const Split<4> a(rP), b(rV);
#pragma unroll
      for (int half = 0; half < 2; ++half) sums[half].add(a, b, half);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 4; ++e) O[0][2 * n + half][e] += sums[half].total(e);
    }
  }
}

// O += P V_j. The accumulator layout of S is the operand layout of P: it never leaves registers.
// kClean: values of V that are not finite count as 0.
template <class Traits, bool kClean = false>
__device__ __forceinline__ void gemm_pv(typename Traits::Output& O,
                                        const typename Traits::Scores& P, Shared<Traits>& smem,
                                        int j) {
  using Element = typename Traits::Element;
  using Rows = typename Traits::Rows;
  const int lane = threadIdx.x % 32;
  if constexpr (Traits::kFloat32) {
    gemm_pv_fp32<Traits, kClean>(O, P, smem.v(j));
  } else {
    const uint32_t sV = smem.v(j) + Rows::offset(lane % 16, lane / 16);
#pragma unroll
    for (int step = 0; step < Traits::kStepsPV; ++step) {
      uint32_t rP[Traits::kTilesQ][4];  // (kRowsPerWarp, 16)
#pragma unroll
      for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float(&pair)[4] = P[m][2 * step + i / 2];
          rP[m][i] = pack<Element>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < Traits::kTilesV / 2; ++n) {
        uint32_t rV[4];  // (16, 16)
        ldmatrix_x4_trans(rV, Rows::advance(sV, 2 * n) + step * 16 * Rows::kRowBytes);
        if constexpr (kClean) clear_non_finite<Element>(rV);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int m = 0; m < Traits::kTilesQ; ++m) {
            mma_m16n8k16<Element>(O[m][2 * n + half], rP[m], rV[2 * half], rV[2 * half + 1]);
          }
        }
      }
    }
  }
}

}  // namespace flash::v1
