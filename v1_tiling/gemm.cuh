// S = Q K^T and O += P V by matrix instructions, fragments straight from shared memory.
#pragma once

#include "common/ptx.cuh"
#include "v1_tiling/load.cuh"
#include "v1_tiling/softmax.cuh"
#include "v1_tiling/tf32.cuh"

namespace flash::v1 {

// The column of O and V that element e of accumulator tile n holds in this lane.
template <class Traits>
__device__ __forceinline__ int output_column(int n, int e, int lane) {
  const int column = lane % 4 * 2 + e % 2;
  return Traits::kFloat32 ? n / 4 * 32 + column * 4 + n % 4 : n * 8 + column;
}

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
      for (int half = 0; half < 2; ++half)
        sums[2 * n + half].add(a, b.high[2 * half], b.high[2 * half + 1], b.low[2 * half],
                               b.low[2 * half + 1]);
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

// O += P V_j of fp32 elements. Keys and columns may be permuted: column t of a P fragment is key 2
// t and column t + 4 is key 2 t + 1, as the accumulators hold them; column g of the i-th of four O
// tiles is column 4 g + i of 32, so that a lane reads four columns of V at once.
template <class Traits, bool kClean>
__device__ __forceinline__ void gemm_pv_fp32(typename Traits::Output& O,
                                             const typename Traits::Scores& S,
                                             Softmax<Traits>& softmax, uint32_t sV) {
  using Rows = typename Traits::Rows;
  const int lane = threadIdx.x % 32;
  const uint32_t even = sV + Rows::offset(lane % 4 * 2, lane / 4);  // key 2 t, columns 4 g ...
  uint32_t rP[Traits::kStepsPV][4];                                 // (kRowsPerWarp, kBlockKV)
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
    Tf32Sum sums[4];
#pragma unroll
    for (int step = 0; step < Traits::kStepsPV; ++step) {
      const uint32_t from =
          Rows::advance(even, 8 * group) + step * Traits::kDepth * Rows::kRowBytes;
      uint32_t rV[2][4];  // (kDepth, 32)
      load_shared_16(rV[0], from);
      load_shared_16(rV[1], (from ^ 16) + Rows::kRowBytes);
      if constexpr (kClean) clear_non_finite<fp32>(rV[0]), clear_non_finite<fp32>(rV[1]);
      const Split<4> a(rP[step]), b0(rV[0]), b1(rV[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[i].add(a, b0.high[i], b1.high[i], b0.low[i], b1.low[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) O[0][4 * group + i][e] += sums[i].total(e);
    }
  }
}

// O += P V_j, with P = exp(S - reference). kClean: values of V that are not finite count as 0.
template <class Traits, bool kClean = false>
__device__ __forceinline__ void gemm_pv(typename Traits::Output& O,
                                        const typename Traits::Scores& S, Softmax<Traits>& softmax,
                                        Shared<Traits>& smem, int j) {
  using Element = typename Traits::Element;
  using Rows = typename Traits::Rows;
  const int lane = threadIdx.x % 32;
  if constexpr (Traits::kFloat32) {
    gemm_pv_fp32<Traits, kClean>(O, S, softmax, smem.v(j));
  } else {
    constexpr int kPairs = Traits::kTilesV / 2;  // of columns: one load of V each
    const uint32_t sV = smem.v(j) + Rows::offset(lane % 16, lane / 16);
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
}

}  // namespace flash::v1
