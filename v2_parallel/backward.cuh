// Backward, K/V outer: a CTA keeps one key block, streams every query block past it, sums dK and
// dV in registers and adds its share of dQ in memory; S and P are recomputed from the saved LSE.
#pragma once

#include "common/gemm_backward.cuh"
#include "common/load_backward.cuh"
#include "common/scores_backward.cuh"
#include "common/store_backward.cuh"
#include "v2_parallel/copy_backward.cuh"
#include "v2_parallel/traits_backward.cuh"

namespace flash::v2 {

template <class Traits, bool kSumsDq>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    backward_kernel(const __grid_constant__ BackwardParams p, BackwardWorkspace<Traits> workspace,
                    int key_blocks, int group) {
  using Element = typename Traits::Element;
  using Rows = typename Traits::Rows;
  constexpr int kBlockQ = Traits::kBlockQ, kBlockKV = Traits::kBlockKV;
  constexpr int kLastPass = Traits::kDqPasses - 1;
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
  auto& tile = shared.tile;

  set_places<Traits>(shared);
  if (threadIdx.x == 0) tile = BackwardTile<Traits>::make(p, workspace, key_blocks, group);
  __syncthreads();  // the tile can be read
  if (tile.key >= tile.sequence.seqlen_k) return;

  load_keys<Traits>(shared, p);
  for (int step = 0; step < Traits::kStagesDout; ++step) load_dout<Traits>(shared, p, step);
  for (int step = 0; step < Traits::kStages; ++step) load_q<Traits>(shared, p, workspace, step);
  cp_async_wait<1>();
  __syncthreads();  // K, V and the first Q, dO are in shared memory
  if (!tile.all_plain() && scrub_keys<Traits, kBlockKV>(shared.k, shared.poison)) {
    if (threadIdx.x == 0) tile.plain = {0, 0};  // the mask knows the keys that were not finite
    __syncthreads();                            // every thread sees that
  }

  float rdK[2][Traits::kWarpDim / 8][4] = {};  // (32, kWarpDim)
  float rdV[2][Traits::kWarpDim / 8][4] = {};  // (32, kWarpDim)
  float rdQ[Traits::kDqPasses][Traits::kDqRows / 16][Traits::kDqPassDim / 8][4];
  float* gdQ = nullptr;  // where they belong
  const int steps = tile.steps();
  int first_row = tile.blocks.begin * kBlockQ, turn = 0;  // of this step
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int stage = step % Traits::kStages;
    const uint32_t sQ = shared_address(shared.q[stage]);
    const uint32_t sdO = shared_address(shared.dout[step % Traits::kStagesDout]);
    const uint32_t sdS = shared_address(shared.ds[stage]), sP = shared_address(shared.p);
    const bool masked = first_row < tile.plain.begin || first_row >= tile.plain.end;
#pragma unroll 1
    for (int part = 0; part < kBlockQ; part += Traits::kStepQ) {
      const ScorePlace place = shared.score_places[threadIdx.x];
      const uint32_t part_bytes = part * Rows::kRowBytes;
      const uint32_t keys = shared_address(shared.k) + place.keys;
      const uint32_t queries = place.queries + part_bytes;
      float rS[2][Traits::kWarpQ / 8][4] = {};
      float rdP[2][Traits::kWarpQ / 8][4];
      uint32_t rP[2][Traits::kWarpQ / 16][4], rdS[2][Traits::kWarpQ / 16][4];
      if (Traits::kLateDq && gdQ != nullptr) {
        gemm_scores<Traits, Traits::kDqTiles>(rS, keys, sQ + queries, [&](int i) {
          add_dq<Traits>(gdQ, rdQ[kLastPass], kLastPass, i, 0);
        });
      } else {
        gemm_scores<Traits, 0>(rS, keys, sQ + queries, [](int) {});
      }
      if constexpr (Traits::kStagesDout == 1) {
        cp_async_wait<1>();
        __syncthreads();  // this dO has arrived
      }
      start_negative<KeysByRows>(rdP, shared.delta[stage] + part + place.stats, 0);
      gemm_scores<Traits, Traits::kScoreTiles>(
          rdP, keys + uint32_t(sizeof(shared.k)), sdO + queries, [&](int i) {
            exponentiate<Traits, KeysByRows>(rP, rS, p, shared.lse[stage] + part + place.stats, i,
                                             0);
          });
      const int slice = threadIdx.x / 32 % Traits::kSplit, row = part + slice * Traits::kWarpQ;
      if (masked) {
        const WarpPlace<Traits> warp;
        mask_scores<Traits, KeysByRows>(rP, rS, rdP, tile.sequence, shared.poison + warp.key,
                                        first_row + row, tile.key + warp.key, warp.lane);
      }
      round_p<Traits>(rP, rS);
      multiply_ds<Element>(rdS, rdP, rS);
      store_fragments<Traits>(shared.ds[stage], place.scores, rdS, row);
      if constexpr (Traits::kSplit > 1) {
        store_fragments<Traits>(shared.p, place.scores, rP, row);
        // P and dS of the keys that kSplit warps share are in shared memory.
        named_barrier_sync(1 + threadIdx.x / 32 / Traits::kSplit, Traits::kSplit * 32);
      }
      const uint32_t channels = shared.dq_places[threadIdx.x].rows + part_bytes;
      const uint32_t scores = Traits::Scores::advance(place.scores, part / 8);
      gemm_keys<Traits>(rdV, rP, sP + scores, sdO + channels, slice);
      gemm_keys<Traits>(rdK, rdS, sdS + scores, sQ + channels, slice);
    }
    cp_async_wait<0>();
    __syncthreads();  // dS is complete, the next Q has arrived, the places of Q and dO are free
    LaterRows<Traits> later(shared, p, workspace, step);
    const DqPlace place = shared.dq_places[threadIdx.x];
    gdQ = tile.dq + (turn * workspace.rows + first_row) * Traits::kHeadDim + place.sums;
    first_row += kBlockQ;
    if (first_row >= tile.blocks.end * kBlockQ) first_row = tile.blocks.begin * kBlockQ, ++turn;
    if constexpr (!kSumsDq) {
      gdQ = nullptr;
      later.copy_all();
      continue;
    }
#pragma unroll
    for (int pass = 0; pass < Traits::kDqPasses; ++pass) {
      constexpr int kSteps = kBlockKV / 16, kTiles = Traits::kDqTiles;
      gemm_dq<Traits>(rdQ[pass], sdS + place.scores, shared_address(shared.k) + place.channels,
                      pass, [&](int k) {
                        later.copy(pass * kSteps + k);
                        const int end = pass == 0 ? 0 : (k + 1) * kTiles / kSteps;
#pragma unroll
                        for (int i = k * kTiles / kSteps; i < end; ++i) {
                          add_dq<Traits>(gdQ, rdQ[pass - 1], pass - 1, i, 0);
                        }
                      });
    }
    if (Traits::kLateDq && step < steps - 1) continue;
#pragma unroll
    for (int i = 0; i < Traits::kDqTiles; ++i) add_dq<Traits>(gdQ, rdQ[kLastPass], kLastPass, i, 0);
  }

  const WarpPlace<Traits> warp;
  store_keys<Traits>(shared, p, rdK, rdV, warp.key, warp.slice, warp.lane);
}

}  // namespace flash::v2
