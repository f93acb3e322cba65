// Backward in fp32: the same loops, products from three of fp16, one stage, no exchange of P.
#pragma once

#include "common/gemm_backward.cuh"
#include "common/load_backward.cuh"
#include "common/scores_backward.cuh"
#include "common/store_backward.cuh"
#include "v1_tiling/split.cuh"
#include "v1_tiling/traits_backward.cuh"

namespace flash::v1 {

// The powers of two of split rows, and the widths of the gradients; p has those of the split rows.
struct Fp32Gradients {
  Descale q, k, v, dout;
  int head_dim, head_dim_v;
};

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
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr bool kRuns = false;  // no asynchronous copies before sm_80
#else
  static constexpr bool kRuns = true;
#endif

  using Rows = SwizzledRows<kHeadDim * 2>;  // Q, dO, K, V: high parts, then low ones

  // dS, (kBlockQ, kBlockKV): a chunk holds what a lane needs of its row for 16 keys. Neighbouring
  // rows, and rows two apart, lie in different halves of the banks.
  static __device__ __forceinline__ int ds_offset(int row, int chunk) {
    return row * kBlockKV * 4 + ((chunk ^ ((row ^ row >> 1) & 1) << 2) << 4);
  }

  struct Shared {
    alignas(128) Element k[kBlockKV * kHeadDim];
    Element v[kBlockKV * kHeadDim];
    Element q[kStages][kBlockQ * kHeadDim];
    Element dout[kStagesDout][kBlockQ * kHeadDim];
    Element ds[kBlockQ * kBlockKV];
    float k_scales[kBlockKV], v_scales[kBlockKV];
    float q_scales[kBlockQ], dout_scales[kBlockQ];
    float lse[kStages][kBlockQ];
    float delta[kStages][kBlockQ];
    BackwardTile<Fp32BackwardTraits> tile;
    uint32_t poison[kBlockKV];  // all ones for a key that was not finite, else 0
  };
};

// S^T += K Q^T, and dP^T += V dO^T: 16 keys of this warp against all rows of the block. Sums are of
// 64 columns.
template <class Traits>
__device__ __forceinline__ void gemm_scores_fp32(float (&rS)[Traits::kTilesQ][4], uint32_t keys,
                                                 uint32_t rows) {
  using Rows = typename Traits::Rows;
  constexpr int kPartBytes = 2 * Traits::kHeadDim;
  keys = opaque(keys), rows = opaque(rows);
#pragma unroll 1
  for (int column = 0; column < 2 * Traits::kHeadDim; column += 128) {  // bytes
    SplitSums<Traits::kTilesQ> sums;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[2][4];  // (16, 16), high and low
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        ldmatrix_x4(a[part], Rows::advance(keys, 2 * step) + column + part * kPartBytes);
      }
#pragma unroll
      for (int n = 0; n < Traits::kTilesQ; n += 2) {
        uint32_t b[2][4];
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          ldmatrix_x4(b[part], Rows::advance(rows, 2 * step) + column + part * kPartBytes +
                                   n * 8 * Rows::kRowBytes);
        }
        sums.add(n, a[0], a[1], b[0], b[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < Traits::kTilesQ; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.add_to(rS[n][e], n, e);
    }
  }
}

// sums += A B for one step of 16 rows of B, which has them by columns.
template <class Traits, int kTiles>
__device__ __forceinline__ void multiply_split(SplitSums<kTiles>& sums, const uint32_t (&high)[4],
                                               const uint32_t (&low)[4], uint32_t rows) {
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    uint32_t b[2][4];  // (16, 16), high and low
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      ldmatrix_x4_trans(b[part], Traits::Rows::advance(rows, n + part * Traits::kTilesDim));
    }
    sums.add(n, high, low, b[0], b[1]);
  }
}

// dV += P^T dO, and dK += dS^T Q: 16 keys of this warp, all channels, all rows of the block.
template <class Traits>
__device__ __forceinline__ void gemm_keys_fp32(float (&rdK)[Traits::kTilesDim][4],
                                               const float (&P)[Traits::kTilesQ][4],
                                               uint32_t rows) {
  if (!any_but_zero(P)) return;  // no row sees these keys
  rows = opaque(rows);
  const SplitScale by = scale_of(P);
  const SplitLeft<Traits::kTilesQ> a(P, by);
#pragma unroll
  for (int tile = 0; tile < Traits::kTilesDim; tile += 4) {
    SplitSums<4> sums;
#pragma unroll
    for (int step = 0; step < Traits::kTilesQ / 2; ++step) {
      multiply_split<Traits>(
          sums, a.high[step], a.low[step],
          Traits::Rows::advance(rows, tile) + step * 16 * Traits::Rows::kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.add_to(rdK[tile + n][e], n, e, by.unit[e / 2]);
    }
  }
}

// What a lane has of rows g and g + 8 of dS, (16, 16), as accumulators have it.
template <class Traits>
__device__ __forceinline__ void fetch_ds(float (&dS)[2][4], uint32_t ds, int step, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t r[4];
    load_shared_16(r, ds + Traits::ds_offset(lane / 4 + 8 * h, step * 4 + lane % 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) dS[i / 2][2 * h + i % 2] = __uint_as_float(r[i]);
  }
}

// dQ += dS K in memory: 16 rows and half the channels for this warp, all keys of the block.
template <class Traits>
__device__ __forceinline__ void add_dq_fp32(float* target, uint32_t ds, uint32_t keys,
                                            int first_tile, int lane) {
  constexpr int kTiles = 4, kSteps = Traits::kBlockKV / 16;
  ds = opaque(ds), keys = Traits::Rows::advance(opaque(keys), first_tile);
  float dS[2][4], largest[2] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    fetch_ds<Traits>(dS, ds, step, lane);
    find_largest(largest, dS);
  }
  const SplitScale by(largest);
#pragma unroll
  for (int tile = 0; tile < Traits::kTilesDim / 2; tile += kTiles) {
    SplitSums<kTiles> sums;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      fetch_ds<Traits>(dS, ds, step, lane);
      const SplitLeft<2> a(dS, by);
      multiply_split<Traits>(
          sums, a.high[0], a.low[0],
          Traits::Rows::advance(keys, tile) + step * 16 * Traits::Rows::kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float total[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) total[e] = sums.total(n, e) * by.unit[e / 2];
      add_fragment(target + (first_tile + tile + n) * 128, total, lane);
    }
  }
}

// What the two rows of a lane have in a row statistic.
struct RowPair {
  float of[2];
  __device__ __forceinline__ RowPair(const float* rows, int lane) {
    const float2 pair = load_shared_pair(shared_address(rows) + lane % 4 * 8);
    of[0] = pair.x, of[1] = pair.y;
  }
};

// P and dS from S and dP, in place, each with the power of two that its right operand's rows were
// divided by, and dS to shared memory with that of K; 0 where the row must not see the key.
template <class Traits>
__device__ __forceinline__ void softmax_fp32(float (&rS)[Traits::kTilesQ][4],
                                             float (&rdP)[Traits::kTilesQ][4],
                                             const BackwardParams& p,
                                             typename Traits::Shared& shared, bool masked,
                                             int first_row, int key, int lane) {
  lane = opaque(lane), key = opaque(key);  // else addresses stay in registers throughout
  const Sequence sequence = shared.tile.sequence;
  const bool capped = Traits::kFeatured && p.softcap != 0.0f;
  const uint32_t ds = shared_address(shared.ds);
  const float scale = __uint_as_float(opaque(__float_as_uint(p.scale)));
  const float exponents = Traits::kFeatured ? kLog2e : scale * kLog2e;
  float k_scale[2], v_scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    k_scale[h] = shared.k_scales[key + KeysByRows::key(0, 0, 2 * h, lane)];
    v_scale[h] = shared.v_scales[key + KeysByRows::key(0, 0, 2 * h, lane)];
  }
#pragma unroll
  for (int n = 0; n < Traits::kTilesQ; ++n) {
    const RowPair lse(&shared.lse[0][n * 8], lane), delta(&shared.delta[0][n * 8], lane);
    const RowPair q_scale(&shared.q_scales[n * 8], lane),
        dout_scale(&shared.dout_scales[n * 8], lane);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = KeysByRows::row(0, n, e, lane), c = key + KeysByRows::key(0, n, e, lane);
      float s = rS[n][e] * (k_scale[e / 2] * q_scale.of[e % 2]), derivative = 1.0f;
      if constexpr (Traits::kFeatured) s *= scale;
      if (capped) {
        const float t = tanhf(s / p.softcap);
        s = t * p.softcap;
        derivative = 1.0f - t * t;
      }
      float probability = exp2f(fmaf(s, exponents, -lse.of[e % 2]));
      const float dp = fmaf(rdP[n][e] * v_scale[e / 2], dout_scale.of[e % 2], -delta.of[e % 2]);
      float dS = probability * derivative * dp;
      if (masked) {
        const bool visible = sequence.visible(first_row + row, shared.tile.key + c);
        const bool poisoned = shared.poison[c] != 0;
        probability = !visible ? 0.0f : poisoned ? CUDART_NAN_F : probability;
        dS = !visible ? 0.0f : poisoned ? CUDART_NAN_F : dS;
      }
      rS[n][e] = probability * dout_scale.of[e % 2];
      rdP[n][e] = dS * q_scale.of[e % 2];
      store_shared_4(
          ds + Traits::ds_offset(row, (key + lane / 4 * 2) / 4) + (lane / 4 % 2 + e / 2 * 2) * 4,
          __float_as_uint(dS * k_scale[e / 2]));
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
                         BackwardWorkspace<Traits> workspace, int slices, Fp32Gradients gradients) {
  if constexpr (!Traits::kRuns) return;
  using Rows = typename Traits::Rows;
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
    load_scales<true, kBlockKV>(shared_address(shared.k_scales), gradients.k, tile.batch, tile.head,
                                tile.sequence.row_k + tile.key, tile.sequence.seqlen_k - tile.key,
                                threadIdx.x);
    load_scales<true, kBlockKV>(shared_address(shared.v_scales), gradients.v, tile.batch, tile.head,
                                tile.sequence.row_k + tile.key, tile.sequence.seqlen_k - tile.key,
                                threadIdx.x);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // K and V are in shared memory
    if (!tile.all_plain() && scrub_keys<Traits, kBlockKV, fp16>(shared.k, shared.poison)) {
      if (threadIdx.x == 0) tile.plain = {0, 0};  // the mask knows the keys that were not finite
      __syncthreads();                            // every thread sees that
    }

    float rdK[Traits::kTilesDim][4] = {}, rdV[Traits::kTilesDim][4] = {};  // (16, kHeadDim)
#pragma unroll 1
    for (int step = 0; step < tile.steps(); ++step) {
      const auto [head_q, first_row] = tile.step(step);
      const bool masked = first_row < tile.plain.begin || first_row >= tile.plain.end;
      load_q<Traits>(shared, p, workspace, step);
      const int rows = tile.sequence.seqlen_q - first_row;
      load_scales<true, Traits::kBlockQ>(shared_address(shared.q_scales), gradients.q, tile.batch,
                                         head_q, tile.sequence.row_q + first_row, rows,
                                         threadIdx.x);
      load_scales<true, Traits::kBlockQ>(shared_address(shared.dout_scales), gradients.dout,
                                         tile.batch, head_q, tile.sequence.row_q + first_row, rows,
                                         threadIdx.x);
      load_dout<Traits>(shared, p, step);
      cp_async_wait<0>();
      __syncthreads();                                                  // Q and dO have arrived
      float rS[Traits::kTilesQ][4] = {}, rdP[Traits::kTilesQ][4] = {};  // (16, kBlockQ)
      const uint32_t by_rows = lane_rows<Rows>(lane) + key * Rows::kRowBytes;
      const uint32_t by_columns = lane_columns<Rows>(lane), right = lane_rows<Rows>(lane);
      gemm_scores_fp32<Traits>(rS, shared_address(shared.k) + by_rows,
                               shared_address(shared.q[0]) + by_columns);
      gemm_scores_fp32<Traits>(rdP, shared_address(shared.v) + by_rows,
                               shared_address(shared.dout[0]) + by_columns);
      softmax_fp32<Traits>(rS, rdP, p, shared, masked, first_row, key, lane);
      gemm_keys_fp32<Traits>(rdV, rS, shared_address(shared.dout[0]) + right);
      gemm_keys_fp32<Traits>(rdK, rdP, shared_address(shared.q[0]) + right);
      __syncthreads();  // dS is complete, Q and dO are no longer read
      const int row16 = warp % 2;
      const int64_t at = head_q * workspace.rows + tile.padded + first_row + row16 * 16;
      add_dq_fp32<Traits>(workspace.dq + at * Traits::kHeadDim,
                          shared_address(shared.ds) + row16 * 16 * kBlockKV * 4,
                          shared_address(shared.k) + right, warp / 2 * (Traits::kTilesDim / 2),
                          lane);
    }
    const int rows = tile.sequence.seqlen_k - tile.key - key;
    const int64_t row = tile.sequence.row_k;
    store_keys_fp32<Traits>(row_of<fp32>(p.dk, tile.batch, row, tile.head, tile.key + key),
                            p.dk.row, rows, gradients.head_dim, rdK, p.scale, lane);
    store_keys_fp32<Traits>(row_of<fp32>(p.dv, tile.batch, row, tile.head, tile.key + key),
                            p.dv.row, rows, gradients.head_dim_v, rdV, 1.0f, lane);
  }
}

}  // namespace flash::v1
