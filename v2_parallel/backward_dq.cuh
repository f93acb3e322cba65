// dQ in a fixed order, for deterministic gradients: Q outer, K/V inner, S and dP computed again.
#pragma once

#include "v2_parallel/backward_tiles.cuh"

namespace flash::v2 {

// A CTA owns as many query rows as the main kernel owns keys; Q and dO take the places of K and
// V in shared memory, and blocks of keys stream through the places of Q and dO.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    dq_kernel(const __grid_constant__ BackwardParams p, BackwardWorkspace<Traits> workspace,
              int blocks) {
  using Element = typename Traits::Element;
  constexpr int kBlockQ = Traits::kBlockKV, kBlockKV = Traits::kBlockQ;
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);

  const RowBlock<kBlockQ> block(p, blocks);
  const Sequence sequence(p, block.batch);
  if (block.row >= sequence.seqlen_q) return;
  const Range rows = sequence.rows(0, sequence.seqlen_k);   // rows that see any key
  const Range keys = sequence.keys(block.row, kBlockQ);     // keys that these rows see
  const int first_block = keys.begin / kBlockKV;
  const int steps =
      keys.begin < keys.end ? (keys.end + kBlockKV - 1) / kBlockKV - first_block : 0;
  const int head_kv = block.head / (p.heads_q / p.heads_kv);

  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int row = warp / Traits::kSplit * Traits::kWarpKeys;  // first row of this warp
  const int slice = warp % Traits::kSplit;                    // of the keys and channels
  const int chunk = slice * Traits::kWarpDim / 8;             // of dQ
  const auto origin = [&](const View& view, int64_t first, int head) {
    return block.batch * view.batch + first * view.row + head * view.head;
  };
  const auto load_kv = [&](int step) {
    if (step < steps) {
      const int stage = step % Traits::kStages, key = (first_block + step) * kBlockKV;
      load_block<Traits, kBlockKV>(shared.q[stage], p.k, origin(p.k, sequence.row_k, head_kv), key,
                                   keys, p.head_dim);
      load_block<Traits, kBlockKV>(shared.dout[stage], p.v, origin(p.v, sequence.row_k, head_kv),
                                   key, keys, p.head_dim);
    }
    cp_async_commit();
  };

  load_block<Traits, kBlockQ>(shared.k, p.q, origin(p.q, sequence.row_q, block.head), block.row,
                              rows, p.head_dim);
  load_block<Traits, kBlockQ>(shared.v, p.dout, origin(p.dout, sequence.row_q, block.head),
                              block.row, rows, p.head_dim);
  const int64_t at = block.head * workspace.rows + block.row +
                     BackwardWorkspace<Traits>::first_row(p, block.batch, sequence.row_q);
  load_kv(0);
  float* stats_lse = shared.lse[0];  // (kBlockQ)
  float* stats_delta = shared.delta[0];
  for (int r = tid; r < kBlockQ; r += Traits::kThreads) {
    const bool in_range = block.row + r < sequence.seqlen_q;
    stats_lse[r] = in_range ? workspace.lse[at + r] : CUDART_INF_F;
    stats_delta[r] = in_range ? workspace.delta[at + r] : 0.0f;
  }

  float rdQ[2][Traits::kWarpDim / 8][4] = {};
  const uint32_t sQ = shared_address(shared.k), sdO = shared_address(shared.v);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int stage = step % Traits::kStages, first_key = (first_block + step) * kBlockKV;
    const uint32_t sK = shared_address(shared.q[stage]), sV = shared_address(shared.dout[stage]);
    const bool masked = !sequence.all_visible(block.row, kBlockQ, first_key, kBlockKV);
    cp_async_wait<0>();
    __syncthreads();  // this K and V have arrived, the other stage is free
    load_kv(step + 1);
    if (masked) scrub_keys<Traits, kBlockKV>(shared.q[stage], shared.poison);
#pragma unroll 1
    for (int part = 0; part < kBlockKV; part += Traits::kStepQ) {
      const int key = part + slice * Traits::kWarpQ;  // in the block
      float rS[2][Traits::kWarpQ / 8][4] = {};
      float rdP[2][Traits::kWarpQ / 8][4];
      uint32_t rP[2][Traits::kWarpQ / 16][4], rdS[2][Traits::kWarpQ / 16][4];
      const float* lse = stats_lse + row;
      const float* poison = shared.poison + key;
      gemm_scores<Traits>(rS, sQ, row, sK, key, lane);
      start_negative<RowsByKeys>(rdP, stats_delta + row, lane);
      gemm_scores<Traits>(rdP, sdO, row, sV, key, lane);
      const int r = block.row + row, c = first_key + key;
      if (masked) {
        exponentiate<Traits, RowsByKeys, true>(rP, rS, p, sequence, lse, poison, r, c, lane);
        mask_dp(rdP, rS);
      } else {
        exponentiate<Traits, RowsByKeys, false>(rP, rS, p, sequence, lse, poison, r, c, lane);
      }
      multiply_ds<Element>(rdS, rdP, rS);
      if constexpr (Traits::kSplit > 1) {
        store_scores<Traits>(shared.ds[step % 2], rdS, row, key, lane);
        named_barrier_sync(1 + warp / Traits::kSplit, Traits::kSplit * 32);  // dS of these rows
      }
      gemm_keys<Traits>(rdQ, rdS, shared_address(shared.ds[step % 2]), row, sK, part, chunk, lane);
    }
  }

  __syncthreads();  // Q is no longer read
  stage_keys<Traits>(shared.k, rdQ, p.scale, row, chunk, lane);
  __syncthreads();  // dQ is staged
  store_block<Traits, kBlockQ>(p.dq, origin(p.dq, sequence.row_q, block.head), block.row,
                               sequence.seqlen_q, p.head_dim, shared.k);
}

}  // namespace flash::v2
