// S = Q K^T and O += P V for the rows of one warp, as matrix instructions of 16 x 8 x 16.
#pragma once

#include "common/ptx.cuh"
#include "v2_parallel/pipeline.cuh"
#include "v2_parallel/softmax.cuh"

namespace flash::v2 {

// The rows of Q that one warp owns, read from shared memory as they are needed.
template <class Traits>
struct Query {
  using Rows = typename Traits::QueryRows;
  uint32_t address;  // of this lane's fragment

  __device__ __forceinline__ explicit Query(const Shared<Traits>& smem) {
    const int lane = threadIdx.x % 32;
    const int row = Team<Traits>().first_row + lane % 16;
    address = opaque(smem.q + Rows::offset(row, lane / 16));
  }

  // 16 rows and 16 columns of Q as an operand.
  __device__ __forceinline__ void fetch(uint32_t (&rQ)[4], int m, int step) const {
    ldmatrix_x4(rQ, Rows::advance(address, 2 * step) + m * 16 * Rows::kRowBytes);
  }
};

// S = Q K_j^T, not scaled, for the first of kParts equal parts of the keys. The copy of a later
// block is started between the products, where its instructions cost no time.
template <int kParts, class Traits, class Copy>
__device__ __forceinline__ void multiply_qk(typename Traits::Scores& S, const Query<Traits>& Q,
                                            const Shared<Traits>& smem, int j, Copy later) {
  using Rows = typename Traits::KeyRows;
  const uint32_t sK = smem.k(j) + opaque(smem.key_lane());
#pragma unroll
  for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kTilesKV; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) S[m][n][e] = 0.0f;
    }
  }
  constexpr int kPairs = Traits::kTilesKV / 2 / kParts;  // of 8 keys: one load of K each
  constexpr int kProducts = Traits::kStepsQK * kPairs;
  uint32_t rQ[2][Traits::kTilesQ][4];  // (kRowsPerWarp, 16), this step and the next
  uint32_t rK[Traits::kAhead + 1][4];  // (16, 16)
  auto fetch = [&](int i) {
    if (i >= kProducts) return;
    ldmatrix_x4(
        rK[i % (Traits::kAhead + 1)],
        Rows::advance(sK, i / kPairs * 2) + i % kPairs * 16 * Traits::kTeam * Rows::kRowBytes);
  };
#pragma unroll
  for (int m = 0; m < Traits::kTilesQ; ++m) Q.fetch(rQ[0][m], m, 0);
#pragma unroll
  for (int i = 0; i < Traits::kAhead; ++i) fetch(i);
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    const int step = i / kPairs, n = i % kPairs;
    fetch(i + Traits::kAhead);
    if (step + 1 < Traits::kStepsQK) {
#pragma unroll
      for (int m = 0; m < Traits::kTilesQ; ++m) {
        const int when = Traits::kEarlyQ ? m * kPairs / 4 : (m + 1) * kPairs / Traits::kTilesQ - 1;
        if (n == when) Q.fetch(rQ[(step + 1) % 2][m], m, step + 1);
      }
    }
    copy_beside<Traits>(later, i);
    const auto& k = rK[i % (Traits::kAhead + 1)];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < Traits::kTilesQ; ++m) {
        mma_m16n8k16<typename Traits::Element>(S[m][2 * n + half], rQ[step % 2][m], k[2 * half],
                                               k[2 * half + 1]);
      }
    }
  }
}

// For all keys of the block, or for the first half of them.
template <class Traits, class Copy>
__device__ __forceinline__ void gemm_qk(typename Traits::Scores& S, const Query<Traits>& Q,
                                        const Shared<Traits>& smem, int j, bool half, Copy later) {
  if constexpr (Traits::kHalves) {
    if (__builtin_expect(half, false)) return multiply_qk<2>(S, Q, smem, j, later);
  }
  multiply_qk<1>(S, Q, smem, j, later);
}

// O += P V_j, with P = exp(S - reference); keys and copies as above.
template <int kParts, class Traits, class Copy>
__device__ __forceinline__ void multiply_pv(typename Traits::Output& O,
                                            const typename Traits::Scores& S,
                                            Softmax<Traits>& softmax, const Shared<Traits>& smem,
                                            int j, Copy later) {
  using Rows = typename Traits::ValueRows;
  constexpr int kPairs = Traits::kTilesV / 2;  // of 8 columns: one load of V each
  constexpr int kProducts = Traits::kStepsPV / kParts * kPairs;
  const uint32_t sV = smem.v(j) + smem.value_lane();
  uint32_t rV[Traits::kAhead + 1][4];  // (16, 16)
  auto fetch = [&](int i) {
    if (i >= kProducts) return;
    ldmatrix_x4_trans(
        rV[i % (Traits::kAhead + 1)],
        Rows::advance(sV, i % kPairs * 2 * Traits::kTeam) + i / kPairs * 16 * Rows::kRowBytes);
  };
#pragma unroll
  for (int i = 0; i < Traits::kAhead; ++i) fetch(i);
  Weights<Traits, kParts> weights(S, softmax, smem);
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    const int step = i / kPairs, n = i % kPairs;
    fetch(i + Traits::kAhead);
    const auto& v = rV[i % (Traits::kAhead + 1)];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < Traits::kTilesQ; ++m) {
        mma_m16n8k16<typename Traits::Element>(O[m][2 * n + half], weights.rP[step % 2][m],
                                               v[2 * half], v[2 * half + 1]);
      }
    }
    weights.advance(S, softmax, step + 1, n, kPairs);
    copy_beside<Traits>(later, i);
  }
}

template <class Traits, class Copy>
__device__ __forceinline__ void gemm_pv(typename Traits::Output& O,
                                        const typename Traits::Scores& S, Softmax<Traits>& softmax,
                                        const Shared<Traits>& smem, int j, bool half, Copy later) {
  if constexpr (Traits::kHalves) {
    if (__builtin_expect(half, false)) return multiply_pv<2>(O, S, softmax, smem, j, later);
  }
  multiply_pv<1>(O, S, softmax, smem, j, later);
}

}  // namespace flash::v2
