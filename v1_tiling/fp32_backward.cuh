// Backward in fp32: the same loops, products from three tf32 ones, one stage, no exchange of P.
#pragma once

#include "common/gemm_backward.cuh"
#include "common/load_backward.cuh"
#include "common/scores_backward.cuh"
#include "common/store_backward.cuh"
#include "v1_tiling/tf32.cuh"
#include "v1_tiling/traits_backward.cuh"

namespace flash::v1 {

template <class Instance, bool kIsFeatured = false>
struct Fp32BackwardTraits {
  using Element = fp32;
  static constexpr bool kFeatured = kIsFeatured;
  static constexpr int kHeadDim = Instance::kHeadDim;
  static constexpr int kBlockQ = 32, kBlockKV = 64;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;  // a warp owns 16 keys
  static constexpr int kCtasPerSm = 2;                      // one hides the other's loads
  static constexpr int kStages = 1, kStagesDout = 1;
  static constexpr bool kDqKernel = false;
  static constexpr int kTilesQ = kBlockQ / 8, kTilesDim = kHeadDim / 8;  // of 8 columns
  static constexpr int kGroup = 4;                                       // tiles of one sum
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr bool kRuns = false;  // no tf32 before sm_80
#else
  static constexpr bool kRuns = true;
#endif

  using Rows = SwizzledRows<kHeadDim * 2>;    // Q, dO, K, V: four bytes an element
  using Scores = SwizzledRows<kBlockKV * 2>;  // dS: (kBlockQ, kBlockKV)

  struct Shared {
    alignas(128) Element k[kBlockKV * kHeadDim];
    Element v[kBlockKV * kHeadDim];
    Element q[kStages][kBlockQ * kHeadDim];
    Element dout[kStagesDout][kBlockQ * kHeadDim];
    Element ds[kBlockQ * kBlockKV];
    float lse[kStages][kBlockQ];
    float delta[kStages][kBlockQ];
    BackwardTile<Fp32BackwardTraits> tile;
    uint32_t poison[kBlockKV];  // all ones for a key that was not finite, else 0
  };
};

// S^T += K Q^T, and dP^T += V dO^T: 16 keys of this warp against all rows of the block.
template <class Traits>
__device__ __forceinline__ void gemm_scores_fp32(float (&rS)[Traits::kTilesQ][4], uint32_t keys,
                                                 uint32_t rows) {
  using Rows = typename Traits::Rows;
  constexpr int kTiles = Traits::kTilesQ, kChain = 4;
#pragma unroll 2
  for (int chain = 0; chain < Traits::kHeadDim / 8; chain += kChain) {
    Tf32Sums<kTiles> sums;
#pragma unroll
    for (int k = 0; k < kChain; ++k) {
      uint32_t a[4], b0[kTiles], b1[kTiles];
      const uint32_t column = chain * 32;
      ldmatrix_x4(a, Rows::advance(keys, 2 * k) + column);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, Rows::advance(rows, 2 * k) + column + n * 8 * Rows::kRowBytes);
        b0[n] = b[0], b1[n] = b[1], b0[n + 1] = b[2], b1[n + 1] = b[3];
      }
      sums.add(Split<4>(a), Split<kTiles>(b0), Split<kTiles>(b1));
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rS[n][e] += sums.total(n, e);
    }
  }
}

// This lane's offset for right operands that fetch_right() reads.
template <class Rows>
__device__ __forceinline__ uint32_t lane_right(int lane) {
  return Rows::offset(lane % 4 * 2, lane / 16) + lane / 4 % 4 * 4;
}

// Right operands (8, 8) of kGroup tiles from rows [8 step, 8 step + 8): row 2 t is the operand's
// row t, row 2 t + 1 its row t + 4, which is the order that accumulators have as left operands.
template <class Traits>
__device__ __forceinline__ void fetch_right(uint32_t (&b0)[Traits::kGroup],
                                            uint32_t (&b1)[Traits::kGroup], uint32_t base, int step,
                                            int tile) {
  using Rows = typename Traits::Rows;
#pragma unroll
  for (int n = 0; n < Traits::kGroup; ++n) {
    const uint32_t even = Rows::advance(base, 2 * (tile + n)) + step * 8 * Rows::kRowBytes;
    b0[n] = load_shared_4(even);
    b1[n] = load_shared_4((even ^ 16) + Rows::kRowBytes);
  }
}

// dV += P^T dO, and dK += dS^T Q: 16 keys of this warp, all channels, all rows of the block.
template <class Traits>
__device__ __forceinline__ void gemm_keys_fp32(float (&rdK)[Traits::kTilesDim][4],
                                               const float (&P)[Traits::kTilesQ][4],
                                               uint32_t rows) {
#pragma unroll
  for (int tile = 0; tile < Traits::kTilesDim; tile += Traits::kGroup) {
    Tf32Sums<Traits::kGroup> sums;
#pragma unroll
    for (int k = 0; k < Traits::kTilesQ; ++k) {
      const uint32_t a[4] = {__float_as_uint(P[k][0]), __float_as_uint(P[k][2]),
                             __float_as_uint(P[k][1]), __float_as_uint(P[k][3])};
      uint32_t b0[Traits::kGroup], b1[Traits::kGroup];
      fetch_right<Traits>(b0, b1, rows, k, tile);
      sums.add(Split<4>(a), Split<Traits::kGroup>(b0), Split<Traits::kGroup>(b1));
    }
#pragma unroll
    for (int n = 0; n < Traits::kGroup; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rdK[tile + n][e] += sums.total(n, e);
    }
  }
}

// dQ += dS K in memory: 16 rows and half the channels for this warp, all keys of the block.
template <class Traits>
__device__ __forceinline__ void add_dq_fp32(float* target, uint32_t ds, uint32_t keys,
                                            int first_tile, int lane) {
  constexpr int kChain = 4;
#pragma unroll 1
  for (int tile = 0; tile < Traits::kTilesDim / 2; tile += Traits::kGroup) {
    float rdQ[Traits::kGroup][4] = {};
    const int first = first_tile + tile;
    const uint32_t columns = keys + first * 32;
#pragma unroll
    for (int chain = 0; chain < Traits::kBlockKV / 8; chain += kChain) {
      Tf32Sums<Traits::kGroup> sums;
#pragma unroll
      for (int k = chain; k < chain + kChain; ++k) {
        uint32_t a[4], b0[Traits::kGroup], b1[Traits::kGroup];
        ldmatrix_x4(a, Traits::Scores::advance(ds, 2 * k));
        fetch_right<Traits>(b0, b1, columns, k, 0);
        sums.add(Split<4>(a), Split<Traits::kGroup>(b0), Split<Traits::kGroup>(b1));
      }
#pragma unroll
      for (int n = 0; n < Traits::kGroup; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rdQ[n][e] += sums.total(n, e);
      }
    }
#pragma unroll
    for (int n = 0; n < Traits::kGroup; ++n) {
      add_fragment(target + (first + n) * 128, rdQ[n], lane);
    }
  }
}

// P and dS from S and dP, in place; 0 where the row must not see the key.
template <class Traits>
__device__ __forceinline__ void softmax_fp32(float (&rS)[Traits::kTilesQ][4],
                                             float (&rdP)[Traits::kTilesQ][4],
                                             const BackwardParams& p,
                                             typename Traits::Shared& shared, bool masked,
                                             int first_row, int key, int lane) {
  const Sequence sequence = shared.tile.sequence;
  const bool capped = Traits::kFeatured && p.softcap != 0.0f;
#pragma unroll
  for (int n = 0; n < Traits::kTilesQ; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = KeysByRows::row(0, n, e, lane), c = key + KeysByRows::key(0, n, e, lane);
      float s = rS[n][e] * p.scale, derivative = 1.0f;
      if (capped) {
        const float t = tanhf(s / p.softcap);
        s = t * p.softcap;
        derivative = 1.0f - t * t;
      }
      float probability = exp2f(fmaf(s, kLog2e, -shared.lse[0][row]));
      float ds = probability * derivative * (rdP[n][e] - shared.delta[0][row]);
      if (masked) {
        const bool visible = sequence.visible(first_row + row, shared.tile.key + c);
        const bool poisoned = shared.poison[c] != 0;
        probability = !visible ? 0.0f : poisoned ? CUDART_NAN_F : probability;
        ds = !visible ? 0.0f : poisoned ? CUDART_NAN_F : ds;
      }
      rS[n][e] = probability;
      rdP[n][e] = ds;
    }
  }
}

// dS to shared memory as rows of queries; keys in the order of fetch_right().
template <class Traits>
__device__ __forceinline__ void store_ds_fp32(uint32_t ds, const float (&rdS)[Traits::kTilesQ][4],
                                              int key, int lane) {
  using Scores = typename Traits::Scores;
#pragma unroll
  for (int n = 0; n < Traits::kTilesQ; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = KeysByRows::row(0, n, e, lane);
      const int chunk = (key + e / 2 * 8) / 4 + lane / 4 % 2;
      store_shared_4(ds + Scores::offset(row, chunk) + lane / 8 * 4, __float_as_uint(rdS[n][e]));
    }
  }
}

// dK or dV of this warp's 16 keys; `target` is the row of its first key.
template <class Traits>
__device__ __forceinline__ void store_keys_fp32(float* target, int64_t stride, int keys, int dim,
                                                const float (&r)[Traits::kTilesDim][4], float scale,
                                                int lane) {
#pragma unroll
  for (int n = 0; n < Traits::kTilesDim; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int c = KeysByRows::key(0, n, e, lane), column = KeysByRows::row(0, n, e, lane);
      if (c < keys && column < dim) target[c * stride + column] = r[n][e] * scale;
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    fp32_backward_kernel(const __grid_constant__ BackwardParams p,
                         BackwardWorkspace<Traits> workspace, int slices) {
  if constexpr (!Traits::kRuns) return;
  using Rows = typename Traits::Rows;
  using Scores = typename Traits::Scores;
  constexpr int kBlockKV = Traits::kBlockKV;
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
  auto& tile = shared.tile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, key = warp * 16;

  // --- key blocks of this slice, one after another
  for (int first_key = int(blockIdx.x % slices) * kBlockKV; first_key < p.seqlen_k;
       first_key = tile.key + slices * kBlockKV) {
    __syncthreads();  // the last block is no longer read
    const int head = int(blockIdx.x / slices);
    if (threadIdx.x == 0) {
      tile = BackwardTile<Traits>(p, first_key, head % p.heads_kv, head / p.heads_kv);
    }
    __syncthreads();  // the tile can be read
    if (tile.key >= tile.sequence.seqlen_k) break;
    load_keys<Traits>(shared, p);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // K and V are in shared memory
    if (!tile.all_plain() && scrub_keys<Traits, kBlockKV>(shared.k, shared.poison)) {
      if (threadIdx.x == 0) tile.plain = {0, 0};  // the mask knows the keys that were not finite
      __syncthreads();                            // every thread sees that
    }

    float rdK[Traits::kTilesDim][4] = {}, rdV[Traits::kTilesDim][4] = {};  // (16, kHeadDim)
#pragma unroll 1
    for (int step = 0; step < tile.steps(); ++step) {
      const auto [head_q, first_row] = tile.step(step);
      const bool masked = first_row < tile.plain.begin || first_row >= tile.plain.end;
      load_q<Traits>(shared, p, workspace, step);
      load_dout<Traits>(shared, p, step);
      cp_async_wait<0>();
      __syncthreads();                                                  // Q and dO have arrived
      float rS[Traits::kTilesQ][4] = {}, rdP[Traits::kTilesQ][4] = {};  // (16, kBlockQ)
      const uint32_t by_rows = lane_rows<Rows>(lane) + key * Rows::kRowBytes;
      const uint32_t by_columns = lane_columns<Rows>(lane), right = lane_right<Rows>(lane);
      gemm_scores_fp32<Traits>(rS, shared_address(shared.k) + by_rows,
                               shared_address(shared.q[0]) + by_columns);
      gemm_scores_fp32<Traits>(rdP, shared_address(shared.v) + by_rows,
                               shared_address(shared.dout[0]) + by_columns);
      softmax_fp32<Traits>(rS, rdP, p, shared, masked, first_row, key, lane);
      store_ds_fp32<Traits>(shared_address(shared.ds), rdP, key, lane);
      gemm_keys_fp32<Traits>(rdV, rS, shared_address(shared.dout[0]) + right);
      gemm_keys_fp32<Traits>(rdK, rdP, shared_address(shared.q[0]) + right);
      __syncthreads();  // dS is complete, Q and dO are no longer read
      const int row16 = warp % 2;
      const int64_t at = head_q * workspace.rows + tile.padded + first_row + row16 * 16;
      add_dq_fp32<Traits>(
          workspace.dq + at * Traits::kHeadDim,
          shared_address(shared.ds) + lane_rows<Scores>(lane) + row16 * 16 * Scores::kRowBytes,
          shared_address(shared.k) + right, warp / 2 * (Traits::kTilesDim / 2), lane);
    }
    const int rows = tile.sequence.seqlen_k - tile.key - key;
    const int64_t row = tile.sequence.row_k;
    store_keys_fp32<Traits>(row_of<fp32>(p.dk, tile.batch, row, tile.head, tile.key + key),
                            p.dk.row, rows, p.head_dim, rdK, p.scale, lane);
    store_keys_fp32<Traits>(row_of<fp32>(p.dv, tile.batch, row, tile.head, tile.key + key),
                            p.dv.row, rows, p.head_dim_v, rdV, 1.0f, lane);
  }
}

}  // namespace flash::v1
