// Backward, K/V outer: a CTA keeps one key block, streams every query block past it, sums dK and
// dV in registers and adds its share of dQ in memory; S and P are recomputed from the saved LSE.
#pragma once

#include "v2_parallel/backward_tiles.cuh"

namespace flash::v2 {

// Where the loop over query heads and query blocks stands.
struct Cursor {
  int head, block;

  __device__ __forceinline__ void advance(Range blocks) {
    if (++block == blocks.end) {
      block = blocks.begin;
      ++head;
    }
  }
};

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
  const int steps = tile.steps();

  const int warp = threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  const int key = warp / Traits::kSplit * Traits::kWarpKeys;  // first key of this warp
  const int slice = warp % Traits::kSplit;                    // of the rows and channels
  const int dq_row = warp % Traits::kDqWarpsQ * Traits::kDqRows;
  const int dq_slice = warp / Traits::kDqWarpsQ;

  constexpr int kDoutAhead = Traits::kStagesDout;  // steps from the load of dO to its use
  Cursor next_q{tile.head * tile.heads, tile.blocks.begin}, next_dout = next_q;
  const auto load_q = [&](int step) {
    if (step < steps) {
      const int row = next_q.block * kBlockQ, stage = step % Traits::kStages;
      load_block<Traits, kBlockQ>(
          shared.q[stage],
          row_of<Element>(p.q, tile.batch, tile.sequence.row_q, next_q.head, row), p.q.row, row,
          tile.rows, p.head_dim);
      const int64_t at = next_q.head * workspace.rows + tile.padded + row;
      load_stats<kBlockQ>(shared.lse[stage], workspace.lse + at, threadIdx.x);
      load_stats<kBlockQ>(shared.delta[stage], workspace.delta + at, threadIdx.x);
      next_q.advance(tile.blocks);
    }
    cp_async_commit();
  };
  const auto load_dout = [&](int step) {
    if (step < steps) {
      const int row = next_dout.block * kBlockQ;
      load_block<Traits, kBlockQ>(
          shared.dout[step % Traits::kStagesDout],
          row_of<Element>(p.dout, tile.batch, tile.sequence.row_q, next_dout.head, row),
          p.dout.row, row, tile.rows, p.head_dim_v);
      next_dout.advance(tile.blocks);
    }
    cp_async_commit();
  };

  load_block<Traits, kBlockKV>(
      shared.k, row_of<Element>(p.k, tile.batch, tile.sequence.row_k, tile.head, tile.key), p.k.row,
      tile.key, tile.keys, p.head_dim);
  load_block<Traits, kBlockKV>(
      shared.v, row_of<Element>(p.v, tile.batch, tile.sequence.row_k, tile.head, tile.key), p.v.row,
      tile.key, tile.keys, p.head_dim_v);
  for (int step = 0; step < kDoutAhead; ++step) load_dout(step);
  for (int step = 0; step < Traits::kStages; ++step) load_q(step);
  cp_async_wait<1>();
  __syncthreads();  // K, V and the first Q, dO are in shared memory
  const bool all_plain = tile.plain.begin <= tile.blocks.begin && tile.blocks.end <= tile.plain.end;
  if (!all_plain && scrub_keys<Traits, kBlockKV>(shared.k, shared.poison)) {
    if (threadIdx.x == 0) tile.plain = {0, 0};  // the mask knows the keys that were not finite
    __syncthreads();                            // every thread sees that
  }

  float rdK[2][Traits::kWarpDim / 8][4] = {};                  // (32, kWarpDim)
  float rdV[2][Traits::kWarpDim / 8][4] = {};                  // (32, kWarpDim)
  float rdQ[Traits::kDqRows / 16][Traits::kDqDim / 8][4];  // (kDqRows, kDqDim)
  float* gdQ = nullptr;  // where rdQ is to be added: during the next step
  Cursor now{tile.head * tile.heads, tile.blocks.begin};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int stage = step % Traits::kStages;
    const uint32_t sQ = shared_address(shared.q[stage]);
    const uint32_t sdO = shared_address(shared.dout[step % Traits::kStagesDout]);
    const uint32_t sdS = shared_address(shared.ds[stage]);
    const bool masked = now.block < tile.plain.begin || now.block >= tile.plain.end;
#pragma unroll 1
    for (int part = 0; part < kBlockQ; part += Traits::kStepQ) {
      const int row = part + slice * Traits::kWarpQ;  // in the block
      lane = opaque(lane);  // addresses are computed again: kept for all steps, they would spill
      const uint32_t by_rows = lane_rows<Rows>(lane), by_columns = lane_columns<Rows>(lane);
      const uint32_t first_key = key * Rows::kRowBytes + by_rows;
      const uint32_t first_row = row * Rows::kRowBytes + by_columns;
      float rS[2][Traits::kWarpQ / 8][4] = {};
      float rdP[2][Traits::kWarpQ / 8][4];
      uint32_t rP[2][Traits::kWarpQ / 16][4], rdS[2][Traits::kWarpQ / 16][4];
      gemm_scores<Traits, Traits::kLateDq ? Traits::kDqTiles : 0>(
          rS, shared_address(shared.k) + first_key, sQ + first_row, [&](int i) {
            if (gdQ != nullptr) add_dq<Traits>(gdQ, rdQ, i, lane);
          });
      gdQ = nullptr;
      if constexpr (kDoutAhead == 1) {
        cp_async_wait<1>();
        __syncthreads();  // this dO has arrived
      }
      start_negative<KeysByRows>(rdP, shared.delta[stage] + row, lane);
      gemm_scores<Traits, Traits::kScoreTiles>(
          rdP, shared_address(shared.v) + first_key, sdO + first_row, [&](int i) {
            exponentiate<Traits, KeysByRows>(rP, rS, p, shared.lse[stage] + row, i, lane);
          });
      if (masked) {
        mask<Traits, KeysByRows>(rP, rS, rdP, tile.sequence, shared.poison + key,
                                 now.block * kBlockQ + row, tile.key + key, lane);
      }
      round_p<Traits>(rP, rS);
      multiply_ds<Element>(rdS, rdP, rS);
      store_scores<Traits>(shared.ds[stage], rdS, key, row, lane);
      if constexpr (Traits::kSplit > 1) {
        store_scores<Traits>(shared.p, rP, key, row, lane);
        // P and dS of the keys that kSplit warps share are in shared memory.
        named_barrier_sync(1 + warp / Traits::kSplit, Traits::kSplit * 32);
      }
      const uint32_t scores = key * Scores::kRowBytes + lane_rows<Scores>(lane);
      const uint32_t channels = part * Rows::kRowBytes + Rows::advance(by_rows, slice * 2);
      gemm_keys<Traits>(rdV, rP, shared_address(shared.p) + scores, sdO + channels, slice);
      gemm_keys<Traits>(rdK, rdS, sdS + scores, sQ + channels, slice);
    }
    cp_async_wait<0>();
    __syncthreads();  // dS is complete, the next Q has arrived, the places of Q and dO are free
    load_dout(step + kDoutAhead);
    load_q(step + Traits::kStages);
    if (workspace.dq != nullptr) {
      lane = opaque(lane);
      const uint32_t first_row = Scores::advance(lane_columns<Scores>(lane), dq_row / 8);
      const uint32_t channels = Rows::advance(lane_rows<Rows>(lane), dq_slice * 2);
      gemm_dq<Traits>(rdQ, sdS + first_row, shared_address(shared.k) + channels);
      const int64_t at = now.head * workspace.rows + tile.padded + now.block * kBlockQ + dq_row;
      gdQ = workspace.dq + at * Traits::kHeadDim + dq_slice * 256;
      if (!Traits::kLateDq || step == steps - 1) {
#pragma unroll
        for (int i = 0; i < Traits::kDqTiles; ++i) add_dq<Traits>(gdQ, rdQ, i, lane);
      }
    }
    now.advance(tile.blocks);
  }

  __syncthreads();  // K and V are no longer read
  stage_keys<Traits>(shared.k, rdK, p.scale, key, slice, lane);
  stage_keys<Traits>(shared.v, rdV, 1.0f, key, slice, lane);
  __syncthreads();  // dK and dV are staged
  store_block<Traits, kBlockKV>(
      row_of<Element>(p.dk, tile.batch, tile.sequence.row_k, tile.head, tile.key), p.dk.row,
      tile.sequence.seqlen_k - tile.key, p.head_dim, shared.k);
  store_block<Traits, kBlockKV>(
      row_of<Element>(p.dv, tile.batch, tile.sequence.row_k, tile.head, tile.key), p.dv.row,
      tile.sequence.seqlen_k - tile.key, p.head_dim_v, shared.v);
}

}  // namespace flash::v2
