// S = Q K^T and O += P V for the rows of one warp, as matrix instructions of 16 x 8 x 16.
#pragma once

#include "common/ptx.cuh"
#include "v2_parallel/load.cuh"
#include "v2_parallel/softmax.cuh"

namespace flash::v2 {

// The rows of Q that one warp owns: in registers for the whole loop when they fit, else read
// from shared memory as they are needed.
template <class Traits>
struct Query {
  static constexpr bool kKept = Traits::kQueryInRegisters;
  using Rows = typename Traits::QueryRows;
  uint32_t address;
  uint32_t kept[kKept ? Traits::kStepsQK : 1][Traits::kTilesQ][4];

  __device__ __forceinline__ explicit Query(const Shared<Traits>& smem) {
    const int lane = threadIdx.x % 32;
    const int row = Team<Traits>().first_row + lane % 16;
    address = opaque(smem.q + Rows::offset(row, lane / 16));
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
                                        const Shared<Traits>& smem, int j) {
  using Rows = typename Traits::KeyRows;
  const uint32_t sK = smem.k(j) + smem.key_lane;
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

// O += P V_j, with P = exp(S - reference).
template <class Traits>
__device__ __forceinline__ void gemm_pv(typename Traits::Output& O,
                                        const typename Traits::Scores& S, Softmax<Traits>& softmax,
                                        const Shared<Traits>& smem, int j) {
  using Rows = typename Traits::ValueRows;
  constexpr int kPairs = Traits::kTilesV / 2;  // of columns: one load of V each
  const uint32_t sV = smem.v(j) + smem.value_lane;
  Weights<Traits> weights(S, softmax, smem);
#pragma unroll
  for (int step = 0; step < Traits::kStepsPV; ++step) {
    auto& rP = weights.rP[step % 2];  // (kRowsPerWarp, 16)
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      uint32_t rV[4];  // (16, 16)
      ldmatrix_x4_trans(rV, Rows::advance(sV, 2 * Traits::kTeam * n) + step * 16 * Rows::kRowBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int m = 0; m < Traits::kTilesQ; ++m) {
          mma_m16n8k16<typename Traits::Element>(O[m][2 * n + half], rP[m], rV[2 * half],
                                                 rV[2 * half + 1]);
        }
      }
      weights.advance(S, softmax, step + 1, n, kPairs);
    }
  }
}

// Before O += P V_j when V_j holds NaN or infinity: adds those to the rows that see their keys,
// then makes them zeros in shared memory, where 0 * V_j would spread them to rows that must not
// know.
template <class Traits>
__device__ __forceinline__ void quarantine(typename Traits::Output& O, const Shared<Traits>& smem,
                                           const Tile<Traits>& tile, int j) {
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % 32;
  const Team<Traits> team;
  const uint32_t sV = smem.v(j) + lane % 4 * 4;
#pragma unroll 1
  for (int key = 0; key < Traits::kBlockKV; ++key) {
#pragma unroll
    for (int n = 0; n < Traits::kTilesV; ++n) {
      const uint32_t pair = load_shared_4(sV + Traits::ValueRows::offset(key, team.column_tile(n)));
      if (!any_non_finite<Element>(pair)) continue;
      const float2 v = unpack<Element>(pair);
#pragma unroll
      for (int e = 0; e < 4 * Traits::kTilesQ; ++e) {
        const int row = tile.warp_row + e / 2 * 8 + lane / 4;
        const float value = e % 2 == 0 ? v.x : v.y;
        const bool seen = tile.sequence.visible(row, j * Traits::kBlockKV + key);
        if (seen && !isfinite(value)) O[e / 4][n][e % 4] += value;
      }
    }
  }
  __syncthreads();  // every warp has read V_j
  clear_non_finite(smem, j);
  __syncthreads();  // V_j is finite for every warp
}

}  // namespace flash::v2
