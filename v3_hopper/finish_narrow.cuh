// The end of dQ in the kernel that sums it, for narrow heads: CTAs that find no more key tiles
// round the sums of a head once all its key tiles have told that their adds are done.
#pragma once

#include "v3_hopper/rows_backward.cuh"
#include "v3_hopper/store_backward.cuh"

namespace flash::v3 {

inline constexpr int kRoundedBytes = kGradientRows * 64;  // half a block of dQ, rounded

// Four 8x8 tiles of 16-bit elements, transposed on their way to shared memory: lane l gives the
// address of row l % 8 of tile l / 8.
__device__ __forceinline__ void store_transposed(uint32_t row, const uint32_t (&tile)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(tile[0]), "r"(tile[1]), "r"(tile[2]), "r"(tile[3])
               : "memory");
}

// Half of a block of dQ, 32 dims from `half`, by one warp: dQ = scale * its fp32 sums, which lie
// transposed (dim, row) in the order of the accumulators.
template <class Element>
__device__ __forceinline__ void round_half(const BackwardParams& p, const Scratch& scratch,
                                           const RowBlock& block, int half, uint32_t memory) {
  constexpr int kSlabs = kGradientRows / 8;
  const int lane = threadIdx.x % 32;
  const auto* dq = reinterpret_cast<const float4*>(scratch.dq + block.index * (kGradientRows * 64));
  float4 sums[2][kSlabs];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int i = 0; i < kSlabs; ++i) {
      // Of rows that see no keys nothing was summed.
      sums[part][i] =
          block.sees_keys ? __ldcg(dq + i * kWarpgroup + (2 * half + part) * 32 + lane) : float4{};
    }
  }
  auto at = [&](int row, int piece) { return memory + row * 64 + (piece ^ row / 2 % 4) * 16; };
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int i = 0; i < kSlabs; i += 2) {
      uint32_t r[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float4& x = sums[part][i + j];
        r[2 * j] = flash::pack<Element>(x.x * p.scale, x.y * p.scale);
        r[2 * j + 1] = flash::pack<Element>(x.z * p.scale, x.w * p.scale);
      }
      store_transposed(at((i + lane / 16) * 8 + lane % 8, 2 * part + lane / 8 % 2), r);
    }
  }
  __syncwarp();
  Element* target = block.of<Element>(p.dq) + 32 * half;
#pragma unroll
  for (int i = 0; i < kGradientRows / 8; ++i) {
    const int row = 8 * i + lane / 4;
    const int piece = lane % 4;
    if (row >= block.rows || 32 * half + piece * 8 >= p.head_dim) continue;
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(at(row, piece))
                 : "memory");
    *reinterpret_cast<uint4*>(target + row * p.dq.row + piece * 8) = x;
  }
  __syncwarp();
}

inline constexpr int kShareBlocks = 2;  // of dQ, that a warp takes at once

// The blocks of dQ of a KV head's query heads are rounded in this many shares.
inline __host__ __device__ int narrow_shares_per_head(const Problem& p) {
  const int blocks = int(blocks_of(p.seqlen_q)) * (p.heads_q / p.heads_kv);
  return (blocks + kShareBlocks - 1) / kShareBlocks;
}
inline int narrow_shares(const Problem& p) {
  return narrow_shares_per_head(p) * p.heads_kv * p.batch;
}

// A warp takes one share of dQ after the other, until all are rounded.
template <class Traits>
__device__ __forceinline__ void finish_dq_blocks(const BackwardParams& p, const Scratch& scratch,
                                                 uint32_t memory) {
  using Element = typename Traits::Element;
  const bool leader = threadIdx.x % 32 == 0;
  const int group = p.heads_q / p.heads_kv;
  const int blocks = int(blocks_of(p.seqlen_q));  // per query head
  const int shares = narrow_shares_per_head(p);
  int claimed = leader ? atomicAdd(scratch.next_share, 1) : 0;
  for (;;) {
    const int share = uniform(claimed);
    if (share >= scratch.shares) return;
    if (leader) claimed = atomicAdd(scratch.next_share, 1);
    const int head = share / shares;  // of keys, in all batches
    const int batch = head / p.heads_kv;
    const int first = share % shares * kShareBlocks;
    const Sequence sequence(p, batch);
    const int tiles = (sequence.seqlen_k + Traits::kBlockKV - 1) / Traits::kBlockKV;
    if (leader) await_turn(scratch.done + head, tiles * Traits::kStagesDQ);
    __syncwarp();
    for (int i = first; i < min(first + kShareBlocks, blocks * group); ++i) {
      const RowBlock block(p, scratch, batch, head % p.heads_kv * group + i / blocks, i % blocks);
      if (block.rows <= 0) continue;
      round_half<Element>(p, scratch, block, 0, memory);
      if (p.head_dim > 32) round_half<Element>(p, scratch, block, 1, memory);
    }
  }
}

}  // namespace flash::v3
