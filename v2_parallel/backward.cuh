// Backward, K/V outer: a CTA keeps one key block, streams every query block past it, sums dK and
// dV in registers and adds its share of dQ in memory; S and P are recomputed from the saved LSE.
#pragma once

#include "v2_parallel/backward_tiles.cuh"

namespace flash::v2 {

// Key blocks of one group of heads after another: the group's Q, dO and dQ stay in L2, and within
// it the key blocks that causal rows visit most often come first.
struct BackwardTile {
  int key, head, batch;

  __device__ __forceinline__ BackwardTile(const BackwardParams& p, int blocks, int group,
                                          int block_kv) {
    const int64_t heads = int64_t(p.batch) * p.heads_kv;
    const int64_t section = blockIdx.x / (int64_t(blocks) * group);
    const int64_t rest = blockIdx.x - section * blocks * group;
    const int64_t left = heads - section * group;
    const int size = left < group ? int(left) : group;
    key = int(rest / size) * block_kv;
    const int64_t which = section * group + rest % size;
    batch = int(which / p.heads_kv);
    head = int(which % p.heads_kv);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    backward_kernel(const __grid_constant__ BackwardParams p, BackwardWorkspace<Traits> workspace,
                    int blocks, int group) {
  using Element = typename Traits::Element;
  constexpr int kBlockQ = Traits::kBlockQ, kBlockKV = Traits::kBlockKV;
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);

  const BackwardTile tile(p, blocks, group, kBlockKV);
  const Sequence sequence(p, tile.batch);
  if (tile.key >= sequence.seqlen_k) return;
  const Range keys = sequence.keys(0, sequence.seqlen_q);  // keys that any row sees
  const Range rows = sequence.rows(tile.key, kBlockKV);    // rows that see any of these keys
  const int first_block = rows.begin / kBlockQ;
  const int row_blocks = max(0, (rows.end + kBlockQ - 1) / kBlockQ - first_block);
  const int heads = p.heads_q / p.heads_kv;
  const int steps = rows.begin < rows.end ? heads * row_blocks : 0;

  const int tid = threadIdx.x, warp = tid / 32;
  int lane = tid % 32;
  const int key = warp / Traits::kSplit * Traits::kWarpKeys;     // first key of this warp
  const int slice = warp % Traits::kSplit;                       // of the rows and channels
  const int chunk = slice * Traits::kWarpDim / 8;                // of dK and dV
  const int dq_row = warp % Traits::kDqWarpsQ * Traits::kDqRows;
  const int dq_chunk = warp / Traits::kDqWarpsQ * Traits::kDqDim / 8;
  const int64_t padded = BackwardWorkspace<Traits>::first_row(p, tile.batch, sequence.row_q);

  const auto load_q = [&](int step) {
    if (step < steps) {
      const int head = tile.head * heads + step / row_blocks;
      const int row = (first_block + step % row_blocks) * kBlockQ;
      lane = opaque(lane);  // addresses are computed again each time: kept, they would not fit
    const int stage = step % Traits::kStages;
      load_block<Traits, kBlockQ>(shared.q[stage], p.q,
                                 tile.batch * p.q.batch + sequence.row_q * p.q.row +
                                     head * p.q.head, row, rows, p.head_dim);
      load_block<Traits, kBlockQ>(shared.dout[stage], p.dout,
                                 tile.batch * p.dout.batch + sequence.row_q * p.dout.row +
                                     head * p.dout.head, row, rows, p.head_dim);
      const int64_t at = head * workspace.rows + padded + row;
      load_stats<kBlockQ>(shared.lse[stage], workspace.lse + at, tid);
      load_stats<kBlockQ>(shared.delta[stage], workspace.delta + at, tid);
    }
    cp_async_commit();
  };

  const int64_t k_origin = tile.batch * p.k.batch + sequence.row_k * p.k.row + tile.head * p.k.head;
  const int64_t v_origin = tile.batch * p.v.batch + sequence.row_k * p.v.row + tile.head * p.v.head;
  load_block<Traits, kBlockKV>(shared.k, p.k, k_origin, tile.key, keys, p.head_dim);
  load_block<Traits, kBlockKV>(shared.v, p.v, v_origin, tile.key, keys, p.head_dim);
  load_q(0);
  load_q(1);
  cp_async_wait<1>();
  __syncthreads();  // K, V and the first Q, dO are in shared memory
  const bool all_masked =  // some rows do not see all keys, and keys are not finite
      !sequence.all_visible(rows.begin, rows.end - rows.begin, tile.key, kBlockKV) &&
      scrub_keys<Traits, kBlockKV>(shared.k, shared.poison);

  float rdK[2][Traits::kWarpDim / 8][4] = {};
  float rdV[2][Traits::kWarpDim / 8][4] = {};
  const uint32_t sK = shared_address(shared.k), sV = shared_address(shared.v);
  const uint32_t sP = shared_address(shared.p);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    lane = opaque(lane);  // addresses are computed again each time: kept, they would not fit
    const int stage = step % Traits::kStages;
    const int block = first_block + step % row_blocks;
    const uint32_t sQ = shared_address(shared.q[stage]);
    const uint32_t sdO = shared_address(shared.dout[stage]);
    const uint32_t sdS = shared_address(shared.ds[step % 2]);
    const bool masked =
        all_masked || !sequence.all_visible(block * kBlockQ, kBlockQ, tile.key, kBlockKV);
#pragma unroll 1
    for (int part = 0; part < kBlockQ; part += Traits::kStepQ) {
      const int row = part + slice * Traits::kWarpQ;  // in the block
      float rS[2][Traits::kWarpQ / 8][4] = {};
      float rdP[2][Traits::kWarpQ / 8][4];
      uint32_t rP[2][Traits::kWarpQ / 16][4], rdS[2][Traits::kWarpQ / 16][4];
      gemm_scores<Traits>(rS, sK, key, sQ, row, lane);
      start_negative<KeysByRows>(rdP, shared.delta[stage] + row, lane);
      gemm_scores<Traits>(rdP, sV, key, sdO, row, lane);
      const float* lse = shared.lse[stage] + row;
      const float* poison = shared.poison + key;
      const int r = block * kBlockQ + row, c = tile.key + key;
      if (masked) {
        exponentiate<Traits, KeysByRows, true>(rP, rS, p, sequence, lse, poison, r, c, lane);
        mask_dp(rdP, rS);
      } else {
        exponentiate<Traits, KeysByRows, false>(rP, rS, p, sequence, lse, poison, r, c, lane);
      }
      multiply_ds<Element>(rdS, rdP, rS);
      store_scores<Traits>(shared.ds[step % 2], rdS, key, row, lane);
      if constexpr (Traits::kSplit > 1) {
        store_scores<Traits>(shared.p, rP, key, row, lane);
        named_barrier_sync(1 + warp / Traits::kSplit, Traits::kSplit * 32);  // P and dS of the
      }                                                                     // shared keys
      gemm_keys<Traits>(rdV, rP, sP, key, sdO, part, chunk, lane);
      gemm_keys<Traits>(rdK, rdS, sdS, key, sQ, part, chunk, lane);
    }
    cp_async_wait<0>();
    __syncthreads();  // dS is complete, the next Q and dO have arrived, this stage is free
    load_q(step + 2);
    if (workspace.dq != nullptr) {
      float rdQ[Traits::kDqRows / 16][Traits::kDqDim / 8][4] = {};
      gemm_dq<Traits>(rdQ, sdS, dq_row, sK, dq_chunk, lane);
      const int64_t head = tile.head * heads + step / row_blocks;
      const int64_t at = head * workspace.rows + padded + block * kBlockQ;
      add_dq<Traits>(workspace.dq + at * Traits::kHeadDim, rdQ, dq_row, dq_chunk, lane);
    }
  }

  __syncthreads();  // K and V are no longer read
  stage_keys<Traits>(shared.k, rdK, p.scale, key, chunk, lane);
  stage_keys<Traits>(shared.v, rdV, 1.0f, key, chunk, lane);
  __syncthreads();  // dK and dV are staged
  const int64_t dk_origin =
      tile.batch * p.dk.batch + sequence.row_k * p.dk.row + tile.head * p.dk.head;
  const int64_t dv_origin =
      tile.batch * p.dv.batch + sequence.row_k * p.dv.row + tile.head * p.dv.head;
  store_block<Traits, kBlockKV>(p.dk, dk_origin, tile.key, sequence.seqlen_k, p.head_dim, shared.k);
  store_block<Traits, kBlockKV>(p.dv, dv_origin, tile.key, sequence.seqlen_k, p.head_dim, shared.v);
}

}  // namespace flash::v2
