// S = Q K^T and O += P V by matrix instructions, fragments straight from shared memory.
#pragma once

#include "common/ptx.cuh"
#include "v1_tiling/load.cuh"
#include "v1_tiling/softmax.cuh"
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
__device__ __forceinline__ void gemm_qk_32(typename Traits::Scores& S, const Query<Traits>& Q,
                                           uint32_t sK) {
  using Rows = typename Traits::Rows;
  Tf32Sums<Traits::kTilesKV> sums;
#pragma unroll
  for (int step = 0; step < Traits::kStepsQK; ++step) {
    uint32_t rQ[1][4];                                      // (kRowsPerWarp, kDepth)
    uint32_t rK0[Traits::kTilesKV], rK1[Traits::kTilesKV];  // (kBlockKV, kDepth)
    Q.fetch(rQ, step);
#pragma unroll
    for (int n = 0; n < Traits::kTilesKV; n += 2) {
      uint32_t r[4];
      ldmatrix_x4(r, Rows::advance(sK, 2 * step) + n * 8 * Rows::kRowBytes);
      rK0[n] = r[0], rK1[n] = r[1], rK0[n + 1] = r[2], rK1[n + 1] = r[3];
    }
    sums.add(Split<4>(rQ[0]), Split<Traits::kTilesKV>(rK0), Split<Traits::kTilesKV>(rK1));
  }
#pragma unroll
  for (int n = 0; n < Traits::kTilesKV; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) S[0][n][e] = sums.total(n, e);
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
  } else {
    gemm_qk_16<Traits>(S, Q, sK);
  }
}

// O += P V_j of fp32 elements. Keys may be permuted: column t of a P fragment is key 2 t and column
// t + 4 is key 2 t + 1, as the accumulators hold them.
template <class Traits, bool kClean>
__device__ __forceinline__ void gemm_pv_32(typename Traits::Output& O,
                                           const typename Traits::Scores& S,
                                           Softmax<Traits>& softmax, uint32_t sV) {
  using Rows = typename Traits::Rows;
  const int lane = threadIdx.x % 32;
  // Key 2 t, column g of lane 4 g + t.
  const uint32_t even = sV + Rows::offset(lane % 4 * 2, lane / 16) + lane / 4 % 4 * 4;
  uint32_t rP[Traits::kStepsPV][4];  // (kRowsPerWarp, kBlockKV)
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int step = 0; step < Traits::kStepsPV; ++step) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float x = softmax.probability(S[0][step][e], 0, e / 2);
      sum[e / 2] += x;
      rP[step][e / 2 + e % 2 * 2] = __float_as_uint(x);
    }
  }
  softmax.row_sum[0][0] += sum[0], softmax.row_sum[0][1] += sum[1];
#pragma unroll
  for (int group = 0; group < Traits::kTilesV / 4; ++group) {
    Tf32Sums<4> sums;
#pragma unroll
    for (int step = 0; step < Traits::kStepsPV; ++step) {
      uint32_t rV[2][4];  // (kDepth, 32)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t from =
            Rows::advance(even, 8 * group + 2 * i) + step * Traits::kDepth * Rows::kRowBytes;
        rV[0][i] = load_shared_4(from);
        rV[1][i] = load_shared_4((from ^ 16) + Rows::kRowBytes);
      }
      if constexpr (kClean) clear_non_finite<fp32>(rV[0]), clear_non_finite<fp32>(rV[1]);
      sums.add(Split<4>(rP[step]), Split<4>(rV[0]), Split<4>(rV[1]));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) O[0][4 * group + i][e] += sums.total(i, e);
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
                                        uint32_t sV) {
  if constexpr (Traits::kFloat32) {
    gemm_pv_32<Traits, kClean>(O, S, softmax, sV);
  } else {
    gemm_pv_16<Traits, kClean>(O, S, softmax, sV);
  }
}

// O += P V_j, with P = exp(S - reference). Poisoned: values of V that are not finite count as 0.
template <class Traits>
__device__ __forceinline__ void gemm_pv(typename Traits::Output& O,
                                        const typename Traits::Scores& S, Softmax<Traits>& softmax,
                                        Shared<Traits>& smem, int j, bool poisoned) {
  if (poisoned) {
    gemm_pv<Traits, true>(O, S, softmax, smem.v(j));
  } else {
    gemm_pv<Traits, false>(O, S, softmax, smem.v(j));
  }
}

}  // namespace flash::v1
