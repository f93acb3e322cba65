// dQ in a fixed order, for deterministic gradients: Q outer, K/V inner, S and dP computed again.
#pragma once

#include "common/gemm_backward.cuh"
#include "common/load_backward.cuh"
#include "common/scores_backward.cuh"
#include "common/store_backward.cuh"
#include "v2_parallel/traits_backward.cuh"

namespace flash::v2 {

// A CTA owns as many query rows as the main kernel owns keys; Q and dO take the places of K and
// V in shared memory, and blocks of keys stream through the places of Q and dO.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    dq_kernel(const __grid_constant__ BackwardParams p, BackwardWorkspace<Traits> workspace,
              int blocks) {
  using Element = typename Traits::Element;
  using Rows = typename Traits::Rows;
  using Scores = typename Traits::Scores;
  constexpr int kBlockQ = Traits::kBlockKV, kBlockKV = Traits::kBlockQ;
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);

  const RowBlock<kBlockQ> block(p, blocks);
  const Sequence sequence(p, block.batch);
  if (block.row >= sequence.seqlen_q) return;
  const Range rows = sequence.rows(0, sequence.seqlen_k);  // rows that see any key
  const Range keys = sequence.keys(block.row, kBlockQ);    // keys that these rows see
  const int first_block = keys.begin / kBlockKV;
  const int steps = keys.begin < keys.end ? (keys.end + kBlockKV - 1) / kBlockKV - first_block : 0;
  const int head_kv = block.head / (p.heads_q / p.heads_kv);

  // Where dO has one stage in the main kernel, V's second takes the place of dS.
  static_assert(Traits::kStagesDout == 2 || sizeof(shared.ds) >= sizeof(shared.dout[0]));
  const auto values = [&](int stage) {
    return Traits::kStagesDout == 2 ? shared.dout[stage % Traits::kStagesDout]
           : stage == 0             ? shared.dout[0]
                                    : shared.ds[0];
  };
  const auto load_kv = [&](int step) {
    if (step < steps) {
      const int stage = step % Traits::kStages, key = (first_block + step) * kBlockKV;
      load_block<Traits, kBlockKV>(shared.q[stage],
                                   row_of<Element>(p.k, block.batch, sequence.row_k, head_kv, key),
                                   p.k.row, key, keys, p.head_dim);
      load_block<Traits, kBlockKV>(values(stage),
                                   row_of<Element>(p.v, block.batch, sequence.row_k, head_kv, key),
                                   p.v.row, key, keys, p.head_dim_v);
    }
    cp_async_commit();
  };

  load_block<Traits, kBlockQ>(
      shared.k, row_of<Element>(p.q, block.batch, sequence.row_q, block.head, block.row), p.q.row,
      block.row, rows, p.head_dim);
  load_block<Traits, kBlockQ>(
      shared.v, row_of<Element>(p.dout, block.batch, sequence.row_q, block.head, block.row),
      p.dout.row, block.row, rows, p.head_dim_v);
  const int64_t at = block.head * workspace.rows + block.row +
                     BackwardWorkspace<Traits>::first_row(p, block.batch, sequence.row_q);
  load_kv(0);
  float* stats_lse = shared.lse[0];  // (kBlockQ)
  float* stats_delta = shared.delta[0];
  for (int r = threadIdx.x; r < kBlockQ; r += Traits::kThreads) {
    const bool in_range = block.row + r < sequence.seqlen_q;
    stats_lse[r] = in_range ? workspace.lse[at + r] : CUDART_INF_F;
    stats_delta[r] = in_range ? workspace.delta[at + r] : 0.0f;
  }

  float rdQ[2][Traits::kWarpDim / 8][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int stage = step % Traits::kStages, block_key = (first_block + step) * kBlockKV;
    const uint32_t sK = shared_address(shared.q[stage]), sV = shared_address(values(stage));
    const bool masked = !sequence.all_visible(block.row, kBlockQ, block_key, kBlockKV);
    cp_async_wait<0>();
    __syncthreads();  // this K and V have arrived, the other stage is free
    load_kv(step + 1);
    if (masked) scrub_keys<Traits, kBlockKV>(shared.q[stage], shared.poison);
#pragma unroll 1
    for (int part = 0; part < kBlockKV; part += Traits::kStepQ) {
      // Positions and addresses are computed again each time: kept for all steps, they would spill.
      const WarpPlace<Traits> warp;
      const int lane = warp.lane, row = warp.key, slice = warp.slice;
      const int key = part + slice * Traits::kWarpQ;  // in the block
      const uint32_t by_rows = lane_rows<Rows>(lane), by_columns = lane_columns<Rows>(lane);
      const uint32_t first_row = row * Rows::kRowBytes + by_rows;
      const uint32_t first_key = key * Rows::kRowBytes + by_columns;
      float rS[2][Traits::kWarpQ / 8][4] = {};
      float rdP[2][Traits::kWarpQ / 8][4];
      uint32_t rP[2][Traits::kWarpQ / 16][4], rdS[2][Traits::kWarpQ / 16][4];
      gemm_scores<Traits, 0>(rS, shared_address(shared.k) + first_row, sK + first_key, [](int) {});
      start_negative<RowsByKeys>(rdP, stats_delta + row, lane);
      gemm_scores<Traits, Traits::kScoreTiles>(
          rdP, shared_address(shared.v) + first_row, sV + first_key,
          [&](int i) { exponentiate<Traits, RowsByKeys>(rP, rS, p, stats_lse + row, i, lane); });
      if (masked) {
        mask_scores<Traits, RowsByKeys>(rP, rS, rdP, sequence, shared.poison + key, block.row + row,
                                        block_key + key, lane);
      }
      multiply_ds<Element>(rdS, rdP, rS);
      if constexpr (Traits::kSplit > 1) {
        store_scores<Traits>(shared.p, rdS, row, key, lane);
        // dS of the rows that kSplit warps share is in shared memory.
        named_barrier_sync(1 + warp.index / Traits::kSplit, Traits::kSplit * 32);
      }
      const uint32_t scores = row * Scores::kRowBytes + lane_rows<Scores>(lane);
      gemm_keys<Traits>(rdQ, rdS, shared_address(shared.p) + Scores::advance(scores, part / 8),
                        sK + part * Rows::kRowBytes + Rows::advance(by_rows, slice * 2), slice);
    }
  }

  __syncthreads();  // Q is no longer read
  const WarpPlace<Traits> warp;
  stage_keys<Traits>(shared.k, rdQ, p.scale, warp.key, warp.slice, warp.lane);
  __syncthreads();  // dQ is staged
  store_block<Traits, kBlockQ>(
      row_of<Element>(p.dq, block.batch, sequence.row_q, block.head, block.row), p.dq.row,
      sequence.seqlen_q - block.row, p.head_dim, shared.k);
}

}  // namespace flash::v2
