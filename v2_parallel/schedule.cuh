// Which CTA owns which Q block, and which K/V blocks that Q block needs.
#pragma once

#include "common/mask.cuh"
#include "v2_parallel/traits.cuh"

namespace flash::v2 {

// A Q block of a head of a batch; heads are counted through the batch.
struct Place {
  int head, block_q;
};

// All Q blocks of all heads as one line of CTAs. Heads are taken in groups whose K and V fit in
// L2; within a group the blocks with the most keys go first, so that the short ones fill the end.
struct Grid {
  int blocks_q;     // per head
  int heads;        // batch * heads_q
  int group;        // heads that are under way together
  bool last_first;  // the last Q block sees the most keys (causal)

  Grid(const Problem& p, int block_q) {
    constexpr int64_t kL2Bytes = 16 << 20;
    blocks_q = (p.seqlen_q + block_q - 1) / block_q;
    heads = p.batch * p.heads_q;
    last_first = p.window_right != kUnlimited;
    const int64_t bytes = int64_t(p.seqlen_k) * (p.head_dim + p.head_dim_v) * 2 + 1;
    const int64_t fitting = kL2Bytes / bytes * (p.heads_q / p.heads_kv);
    group = int(fitting < 1 ? 1 : fitting > heads ? heads : fitting);
  }

  int64_t tiles() const { return int64_t(blocks_q) * heads; }

  __device__ __forceinline__ Place place(int tile) const {
    const int first_head = tile / (blocks_q * group) * group;
    const int heads_here = min(group, heads - first_head);
    const int rest = tile - first_head * blocks_q;
    const int block = rest / heads_here;
    return {first_head + rest % heads_here, last_first ? blocks_q - 1 - block : block};
  }
};

// The work of one CTA: one Q block of one head, and of one warp: kRowsPerWarp of its rows.
template <class Traits>
struct Tile {
  static constexpr int kBlockKV = Traits::kBlockKV;

  int batch, head, head_kv;
  Sequence sequence;
  int row;       // first row of the Q block
  int warp_row;  // first row of this warp
  Range keys;    // keys that any row of the Q block sees
  Range blocks;  // K/V blocks that hold them

  __device__ __forceinline__ Tile(const ForwardParams& p, const Grid& grid)
      : Tile(p, grid, grid.place(blockIdx.x)) {}

  __device__ __forceinline__ Tile(const ForwardParams& p, const Grid& grid, Place place)
      : batch(place.head / p.heads_q),
        head(place.head % p.heads_q),
        head_kv(head / (p.heads_q / p.heads_kv)),
        sequence(p, batch),
        row(place.block_q * Traits::kBlockQ),
        warp_row(row + int(threadIdx.x) / 32 * Traits::kRowsPerWarp),
        keys(sequence.keys(row, Traits::kBlockQ)),
        blocks{keys.begin / kBlockKV, (keys.end + kBlockKV - 1) / kBlockKV} {}

  __device__ __forceinline__ bool empty() const { return row >= sequence.seqlen_q; }

  // Every row of the Q block, or of this warp, sees every key of block j.
  __device__ __forceinline__ bool all_visible(int j) const {
    return sequence.all_visible(row, Traits::kBlockQ, j * kBlockKV, kBlockKV);
  }
  __device__ __forceinline__ bool warp_sees_all(int j) const {
    return sequence.all_visible(warp_row, Traits::kRowsPerWarp, j * kBlockKV, kBlockKV);
  }
  __device__ __forceinline__ bool warp_sees_none(int j) const {
    const Range seen = sequence.keys(warp_row, Traits::kRowsPerWarp);
    return j * kBlockKV >= seen.end || (j + 1) * kBlockKV <= seen.begin;
  }
};

}  // namespace flash::v2
