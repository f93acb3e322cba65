// S = Q K^T and O += P V by matrix instructions, fragments straight from shared memory.
#pragma once

#include "common/ptx.cuh"
#include "v1_tiling/load.cuh"
#include "v1_tiling/softmax.cuh"
#include "v1_tiling/split.cuh"

namespace flash::v1 {

// Elements that are NaN or infinite become 0.
template <class Element>
__device__ __forceinline__ void clear_non_finite(uint32_t (&r)[4]) {
  constexpr uint32_t kBits = kExponentBits<Element>;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if ((r[i] & kBits) == kBits) r[i] &= 0xffff0000u;
    if ((r[i] >> 16 & kBits) == kBits) r[i] &= 0x0000ffffu;
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

  // Call when Q is visible.
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

// S = Q K_j^T of fp32 elements, of rows as they were scaled to be split. Sums are of 64 columns.
template <class Traits>
__device__ __forceinline__ void gemm_qk_32(typename Traits::Scores& S, const Query<Traits>& Q,
                                           uint32_t sK) {
  using Rows = typename Traits::Rows;
  constexpr int kChain = 4;
#pragma unroll
  for (int chain = 0; chain < Traits::kStepsQK; chain += kChain) {
    SplitSums<Traits::kTilesKV> sums;
#pragma unroll
    for (int step = chain; step < chain + kChain; ++step) {
      uint32_t rQ[2][1][4];  // (kRowsPerWarp, 16), high and low
      Q.fetch(rQ[0], step);
      Q.fetch(rQ[1], step + Traits::kStepsQK);
#pragma unroll
      for (int n = 0; n < Traits::kTilesKV; n += 2) {
        uint32_t rK[2][4];  // (16, 16), high and low
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          ldmatrix_x4(rK[part], Rows::advance(sK, 2 * (step + part * Traits::kStepsQK)) +
                                    n * 8 * Rows::kRowBytes);
        }
        sums.add(n, rQ[0][0], rQ[1][0], rK[0], rK[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < Traits::kTilesKV; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (chain == 0) {
          S[0][n][e] = sums.total(n, e);
        } else {
          sums.add_to(S[0][n][e], n, e);
        }
      }
    }
  }
}

// S = Q K_j^T of 16-bit elements.
template <class Traits>
__device__ __forceinline__ void gemm_qk_16(typename Traits::Scores& S, const Query<Traits>& Q,
                                           uint32_t sK) {
  using Rows = typename Traits::Rows;
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
    uint32_t rQ[Traits::kTilesQ][4];       // (kRowsPerWarp, 16)
    uint32_t rK[Traits::kTilesKV / 2][4];  // (kBlockKV, 16)
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

// S = Q K_j^T, not scaled.
template <class Traits>
__device__ __forceinline__ void gemm_qk(typename Traits::Scores& S, const Query<Traits>& Q,
                                        Shared<Traits>& smem, int j) {
  const int lane = threadIdx.x % 32;
  const uint32_t sK =
      opaque(smem.k(j)) + Traits::Rows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  if constexpr (Traits::kFloat32) {
    gemm_qk_32<Traits>(S, Q, sK);
    join(S, smem, j);
  } else {
    gemm_qk_16<Traits>(S, Q, sK);
  }
}

// O += P V_j of fp32 elements.
template <class Traits, bool kClean>
__device__ __forceinline__ void gemm_pv_32(typename Traits::Output& O,
                                           const typename Traits::Scores& S,
                                           Softmax<Traits>& softmax, uint32_t sV,
                                           uint32_t v_scales) {
  using Rows = typename Traits::Rows;
  const int lane = opaque(threadIdx.x % 32);
  sV += Rows::offset(lane % 16, lane / 16);
  float P[Traits::kTilesKV][4];
  weigh(P, S, softmax, v_scales);
  const SplitScale by = scale_of(P);
  const SplitLeft<Traits::kTilesKV> rP(P, by);  // (kRowsPerWarp, kBlockKV)
#pragma unroll
  for (int group = 0; group < Traits::kTilesV; group += 4) {
    SplitSums<4> sums;
#pragma unroll
    for (int step = 0; step < Traits::kStepsPV; ++step) {
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t rV[2][4];  // (16, 16), high and low
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          ldmatrix_x4_trans(rV[part], Rows::advance(sV, group + n + part * Traits::kTilesV) +
                                          step * 16 * Rows::kRowBytes);
          if constexpr (kClean) clear_non_finite<fp16>(rV[part]);
        }
        sums.add(n, rP.high[step], rP.low[step], rV[0], rV[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.add_to(O[0][group + n][e], n, e, by.unit[e / 2]);
    }
  }
}

// O += P V_j of 16-bit elements.
template <class Traits, bool kClean>
__device__ __forceinline__ void gemm_pv_16(typename Traits::Output& O,
                                           const typename Traits::Scores& S,
                                           Softmax<Traits>& softmax, uint32_t sV) {
  using Element = typename Traits::Element;
  using Rows = typename Traits::Rows;
  constexpr int kPairs = Traits::kTilesV / 2;  // of columns: one load of V each
  const int lane = threadIdx.x % 32;
  sV += Rows::offset(lane % 16, lane / 16);
  Weights<Traits> weights(S, softmax);
#pragma unroll
  for (int step = 0; step < Traits::kStepsPV; ++step) {
    auto& rP = weights.rP[step % 2];  // (kRowsPerWarp, 16)
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
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
      weights.advance(S, softmax, step + 1, n, kPairs);
    }
  }
}

template <class Traits, bool kClean>
__device__ __forceinline__ void gemm_pv(typename Traits::Output& O,
                                        const typename Traits::Scores& S, Softmax<Traits>& softmax,
                                        const Shared<Traits>& smem, int j) {
  if constexpr (Traits::kFloat32) {
    gemm_pv_32<Traits, kClean>(O, S, softmax, smem.v(j), smem.v_scales(j));
  } else {
    gemm_pv_16<Traits, kClean>(O, S, softmax, smem.v(j));
  }
}

// O += P V_j, with P = exp(S - reference). Poisoned: values of V that are not finite count as 0.
template <class Traits>
__device__ __forceinline__ void gemm_pv(typename Traits::Output& O,
                                        const typename Traits::Scores& S, Softmax<Traits>& softmax,
                                        Shared<Traits>& smem, int j, bool poisoned) {
  if (__builtin_expect(poisoned, false)) {
    gemm_pv<Traits, true>(O, S, softmax, smem, j);
  } else {
    gemm_pv<Traits, false>(O, S, softmax, smem, j);
  }
}

}  // namespace flash::v1
