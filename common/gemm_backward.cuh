// The five products of the backward pass. Addresses hold the lane's part, so that a step of the
// loops costs one XOR or less.
#pragma once

#include "common/ptx.cuh"
#include "common/swizzle.cuh"

namespace flash {

// This lane's offset for a left operand stored by rows, or a right operand stored transposed.
template <class Rows>
__device__ __forceinline__ uint32_t lane_rows(int lane) {
  return Rows::offset(lane % 16, lane / 16);
}

// And for a right operand stored by columns, or a left operand stored transposed.
template <class Rows>
__device__ __forceinline__ uint32_t lane_columns(int lane) {
  return Rows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// S^T += K Q^T, and dP^T += V dO^T: 32 keys of this warp against kWarpQ rows. between(i), i below
// kParts, is other work that hides behind the products.
template <class Traits, int kParts, class Between>
__device__ __forceinline__ void gemm_scores(float (&rS)[2][Traits::kWarpQ / 8][4], uint32_t keys,
                                            uint32_t rows, Between between) {
  using Rows = typename Traits::Rows;
  constexpr int kSteps = Traits::kHeadDim / 16;
  constexpr int kColumns = Traits::kWarpQ / 16;
  uint32_t a[2][2][4], b[2][kColumns][4];  // two steps: one is fetched while the other multiplies
  const auto fetch = [&](int k) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      ldmatrix_x4(a[k % 2][m], Rows::advance(keys, k * 2) + m * 16 * Rows::kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      ldmatrix_x4(b[k % 2][n], Rows::advance(rows, k * 2) + n * 16 * Rows::kRowBytes);
    }
  };
  fetch(0);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    if (k + 1 < kSteps) fetch(k + 1);
#pragma unroll
    for (int n = 0; n < kColumns * 2; ++n) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint32_t (&rB)[4] = b[k % 2][n / 2];
        mma_m16n8k16<typename Traits::Element>(rS[m][n], a[k % 2][m], rB[n % 2 * 2],
                                               rB[n % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int i = k * kParts / kSteps; i < (k + 1) * kParts / kSteps; ++i) between(i);
  }
}

// dV += P^T dO, and dK += dS^T Q: 32 keys of this warp, its slice of the channels, kStepQ rows. Its
// own slice of P^T comes from registers, those of the other warps from shared memory.
template <class Traits>
__device__ __forceinline__ void gemm_keys(float (&rdK)[2][Traits::kWarpDim / 8][4],
                                          const uint32_t (&rP)[2][Traits::kWarpQ / 16][4],
                                          uint32_t scores, uint32_t rows, int slice) {
  using Rows = typename Traits::Rows;
  constexpr int kOwn = Traits::kWarpQ / 16, kColumns = Traits::kWarpDim / 16;
  constexpr int kSteps = Traits::kStepQ / 16;
  uint32_t a[2][2][4], b[2][4];  // fetched one step ahead
  const auto fetch_a = [&](int k) {
    const int step = (slice * kOwn + k) % kSteps;  // own rows first
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (k < kOwn) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[k % 2][m][i] = rP[m][k % kOwn][i];
      } else {
        ldmatrix_x4(a[k % 2][m], (scores ^ (step * 32)) + m * 16 * Traits::Scores::kRowBytes);
      }
    }
  };
  const auto fetch_b = [&](int i) {
    const int step = (slice * kOwn + i / kColumns) % kSteps;
    ldmatrix_x4_trans(b[i % 2], Rows::advance(rows + step * (16 * Rows::kRowBytes),
                                              i % kColumns * Traits::kSplit * 2));
  };
  fetch_a(0);
  fetch_b(0);
#pragma unroll
  for (int i = 0; i < kSteps * kColumns; ++i) {
    const int k = i / kColumns, n = i % kColumns;
    if (i + 1 < kSteps * kColumns) fetch_b(i + 1);
    if (n == 0 && k + 1 < kSteps) fetch_a(k + 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_m16n8k16<typename Traits::Element>(rdK[m][n * 2 + half], a[k % 2][m],
                                               b[i % 2][half * 2], b[i % 2][half * 2 + 1]);
      }
    }
  }
}

struct NoWork {
  __device__ __forceinline__ void operator()(int) const {}
};

// dQ = dS K: this warp's rows and the channels of one pass, all keys of the block. between(k) is
// other work, after the products of 16 keys.
template <class Traits, class Between = NoWork>
__device__ __forceinline__ void gemm_dq(
    float (&rdQ)[Traits::kDqRows / 16][Traits::kDqPassDim / 8][4], uint32_t ds, uint32_t keys,
    int pass, Between between = {}) {
  using Rows = typename Traits::Rows;
  constexpr int kTiles = Traits::kDqRows / 16, kColumns = Traits::kDqPassDim / 16;
  constexpr int kSteps = Traits::kBlockKV / 16;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns * 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rdQ[m][n][e] = 0.0f;
    }
  }
  uint32_t a[2][kTiles][4], b[2][kColumns][4];  // fetched one step ahead
  const auto fetch = [&](int k) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      ldmatrix_x4_trans(a[k % 2][m],
                        Traits::Scores::advance(ds, m * 2) + k * 16 * Traits::Scores::kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int column = (pass * kColumns + n) * Traits::kDqWarpsDim * 2;
      ldmatrix_x4_trans(b[k % 2][n], Rows::advance(keys, column) + k * 16 * Rows::kRowBytes);
    }
  };
  fetch(0);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    if (k + 1 < kSteps) fetch(k + 1);
#pragma unroll
    for (int n = 0; n < kColumns * 2; ++n) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const uint32_t (&rB)[4] = b[k % 2][n / 2];
        mma_m16n8k16<typename Traits::Element>(rdQ[m][n], a[k % 2][m], rB[n % 2 * 2],
                                               rB[n % 2 * 2 + 1]);
      }
    }
    between(k);
  }
}

}  // namespace flash
