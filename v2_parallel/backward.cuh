// Backward, K/V outer: a CTA keeps one key block, streams every query block past it, sums dK and
// dV in registers and adds its share of dQ in memory; S and P are recomputed from the saved LSE.
#pragma once

#include "common/gemm_backward.cuh"
#include "common/load_backward.cuh"
#include "common/scores_backward.cuh"
#include "common/store_backward.cuh"
#include "v2_parallel/traits_backward.cuh"

namespace flash::v2 {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    backward_kernel(const __grid_constant__ BackwardParams p, BackwardWorkspace<Traits> workspace,
                    int key_blocks, int group) {
  using Element = typename Traits::Element;
  using Rows = typename Traits::Rows;
  using Scores = typename Traits::Scores;
  constexpr int kBlockQ = Traits::kBlockQ, kBlockKV = Traits::kBlockKV;
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);

  {
    const auto tile = BackwardTile<Traits>::make(p, key_blocks, group);
    if (tile.key >= tile.sequence.seqlen_k) return;
    if (threadIdx.x == 0) shared.tile = tile;
  }
  __syncthreads();  // the tile can be read
  auto& tile = shared.tile;

  load_keys<Traits>(shared, p);
  for (int step = 0; step < Traits::kStagesDout; ++step) load_dout<Traits>(shared, p, step);
  for (int step = 0; step < Traits::kStages; ++step) load_q<Traits>(shared, p, workspace, step);
  cp_async_wait<1>();
  __syncthreads();  // K, V and the first Q, dO are in shared memory
  if (!tile.all_plain() && scrub_keys<Traits, kBlockKV>(shared.k, shared.poison)) {
    if (threadIdx.x == 0) tile.plain = {0, 0};  // the mask knows the keys that were not finite
    __syncthreads();                            // every thread sees that
  }

  float rdK[2][Traits::kWarpDim / 8][4] = {};                  // (32, kWarpDim)
  float rdV[2][Traits::kWarpDim / 8][4] = {};                  // (32, kWarpDim)
  float rdQ[Traits::kDqRows / 16][Traits::kDqPassDim / 8][4];  // (kDqRows, kDqPassDim)
  float* gdQ = nullptr;                                        // where they belong
#pragma unroll 1
  for (int step = 0; step < tile.steps(); ++step) {
    const int stage = step % Traits::kStages;
    const uint32_t sQ = shared_address(shared.q[stage]);
    const uint32_t sdO = shared_address(shared.dout[step % Traits::kStagesDout]);
    const uint32_t sdS = shared_address(shared.ds[stage]);
    const int first_row = tile.step(step).row;
    const bool masked = first_row < tile.plain.begin || first_row >= tile.plain.end;
#pragma unroll 1
    for (int part = 0; part < kBlockQ; part += Traits::kStepQ) {
      // Positions and addresses are computed again each time: kept for all steps, they would spill.
      const WarpPlace<Traits> warp;
      const int lane = warp.lane, key = warp.key, slice = warp.slice;
      const int row = part + slice * Traits::kWarpQ;  // in the block
      const uint32_t by_rows = lane_rows<Rows>(lane), by_columns = lane_columns<Rows>(lane);
      const uint32_t by_keys = key * Rows::kRowBytes + by_rows;
      const uint32_t by_queries = row * Rows::kRowBytes + by_columns;
      float rS[2][Traits::kWarpQ / 8][4] = {};
      float rdP[2][Traits::kWarpQ / 8][4];
      uint32_t rP[2][Traits::kWarpQ / 16][4], rdS[2][Traits::kWarpQ / 16][4];
      gemm_scores<Traits, Traits::kLateDq ? Traits::kDqTiles : 0>(
          rS, shared_address(shared.k) + by_keys, sQ + by_queries, [&](int i) {
            if (gdQ != nullptr) add_dq<Traits>(gdQ, rdQ, Traits::kDqPasses - 1, i, lane);
          });
      if constexpr (Traits::kStagesDout == 1) {
        cp_async_wait<1>();
        __syncthreads();  // this dO has arrived
      }
      start_negative<KeysByRows>(rdP, shared.delta[stage] + row, lane);
      gemm_scores<Traits, Traits::kScoreTiles>(
          rdP, shared_address(shared.v) + by_keys, sdO + by_queries, [&](int i) {
            exponentiate<Traits, KeysByRows>(rP, rS, p, shared.lse[stage] + row, i, lane);
          });
      if (masked) {
        mask_scores<Traits, KeysByRows>(rP, rS, rdP, tile.sequence, shared.poison + key,
                                        tile.step(step).row + row, tile.key + key, lane);
      }
      round_p<Traits>(rP, rS);
      multiply_ds<Element>(rdS, rdP, rS);
      store_scores<Traits>(shared.ds[stage], rdS, key, row, lane);
      if constexpr (Traits::kSplit > 1) {
        store_scores<Traits>(shared.p, rP, key, row, lane);
        // P and dS of the keys that kSplit warps share are in shared memory.
        named_barrier_sync(1 + warp.index / Traits::kSplit, Traits::kSplit * 32);
      }
      const uint32_t scores = key * Scores::kRowBytes + lane_rows<Scores>(lane);
      const uint32_t channels = part * Rows::kRowBytes + Rows::advance(by_rows, slice * 2);
      gemm_keys<Traits>(rdV, rP, shared_address(shared.p) + scores, sdO + channels, slice);
      gemm_keys<Traits>(rdK, rdS, sdS + scores, sQ + channels, slice);
    }
    cp_async_wait<0>();
    __syncthreads();  // dS is complete, the next Q has arrived, the places of Q and dO are free
    load_dout<Traits>(shared, p, step + Traits::kStagesDout);
    load_q<Traits>(shared, p, workspace, step + Traits::kStages);
    if (workspace.dq != nullptr) {
      const WarpPlace<Traits> warp;
      const uint32_t queries = Scores::advance(lane_columns<Scores>(warp.lane), warp.dq_row / 8);
      const uint32_t channels = Rows::advance(lane_rows<Rows>(warp.lane), warp.dq_slice * 2);
      const auto [head, first_row] = tile.step(step);
      const int64_t at = head * workspace.rows + tile.padded + first_row + warp.dq_row;
      gdQ = workspace.dq + at * Traits::kHeadDim + warp.dq_slice * 256;
#pragma unroll
      for (int pass = 0; pass < Traits::kDqPasses; ++pass) {
        const bool late = Traits::kLateDq && pass == Traits::kDqPasses - 1;
        gemm_dq<Traits>(rdQ, sdS + queries, shared_address(shared.k) + channels, pass);
        if (late && step < tile.steps() - 1) continue;
#pragma unroll
        for (int i = 0; i < Traits::kDqTiles; ++i) add_dq<Traits>(gdQ, rdQ, pass, i, warp.lane);
      }
    }
  }

  const WarpPlace<Traits> warp;
  store_keys<Traits>(shared, p, rdK, rdV, warp.key, warp.slice, warp.lane);
}

}  // namespace flash::v2
