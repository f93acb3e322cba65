// The end of dQ in the kernel that sums it: where the last key tiles leave multiprocessors idle,
// CTAs behind them round the sums, head by head, once all key tiles of a head have told that their
// adds are done.
#pragma once

#include "v3_hopper/rows_backward.cuh"
#include "v3_hopper/store_backward.cuh"

namespace flash::v3 {

inline constexpr int kBlocksAtOnce = 8;  // of dQ, that one CTA rounds

// The blocks of dQ of a KV head's query heads are rounded in this many shares.
inline __host__ __device__ int shares_per_head(const Problem& p) {
  const int blocks = int(blocks_of(p.seqlen_q)) * (p.heads_q / p.heads_kv);
  return (blocks + kBlocksAtOnce - 1) / kBlocksAtOnce;
}

// dQ = scale * its fp32 sums, for one block, by one warpgroup. `rows` is its own memory.
template <int kDim, class Element>
__device__ __forceinline__ void round_rows(const BackwardParams& p, const Scratch& scratch,
                                           const RowBlock& block, Element* rows, int barrier) {
  constexpr int kStride = kDim + 8;  // elements; spreads rows over banks
  const int thread = threadIdx.x % kWarpgroup;
  const auto* dq =
      reinterpret_cast<const float4*>(scratch.dq + block.index * (kGradientRows * kDim)) + thread;
  float4 sums[kDim / 8];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    // Of rows that see no keys nothing was summed.
    sums[i] = block.sees_keys ? __ldcg(dq + i * kWarpgroup) : float4{};
  }
  round_sums<kStride>(rows, sums, p.scale);
  named_sync(barrier, kWarpgroup);  // all rows are rounded
  Element* target = block.of<Element>(p.dq);
#pragma unroll
  for (int i = thread; i < kGradientRows * kDim / 8; i += kWarpgroup) {
    const int to = i / (kDim / 8);
    const int piece = i % (kDim / 8) * 8;
    if (to >= block.rows || piece >= p.head_dim) continue;
    *reinterpret_cast<uint4*>(target + to * p.dq.row + piece) =
        *reinterpret_cast<const uint4*>(rows + to * kStride + piece);
  }
  named_sync(barrier, kWarpgroup);  // and copied
}

// One share of dQ, by all warpgroups of a CTA.
template <class Traits>
__device__ __forceinline__ void finish_dq(const BackwardParams& p, const Scratch& scratch,
                                          int share, uint8_t* memory) {
  using Element = typename Traits::Element;
  constexpr int kDim = Traits::kHeadDim;
  const int warpgroup = threadIdx.x / kWarpgroup;
  const int shares = shares_per_head(p);
  const int head = share / shares;  // of keys, in all batches
  const int batch = head / p.heads_kv;
  const int group = p.heads_q / p.heads_kv;
  const int blocks = int(blocks_of(p.seqlen_q));  // per query head
  const Sequence sequence(p, batch);
  const int tiles = (sequence.seqlen_k + Traits::kBlockKV - 1) / Traits::kBlockKV;
  if (threadIdx.x == 0) await_turn(scratch.done + head, tiles * Traits::kConsumers);
  __syncthreads();
  auto* rows = reinterpret_cast<Element*>(memory) + warpgroup * kGradientRows * (kDim + 8);
  const int first = share % shares * kBlocksAtOnce;
  const int end = min(first + kBlocksAtOnce, group * blocks);
  for (int i = first + warpgroup; i < end; i += Traits::kThreads / kWarpgroup) {
    const int query_head = head % p.heads_kv * group + i / blocks;
    const RowBlock block(p, scratch, batch, query_head, i % blocks);
    if (block.rows > 0) {
      round_rows<kDim>(p, scratch, block, rows, kWarpgroupDone + warpgroup);
    }
  }
}

}  // namespace flash::v3
