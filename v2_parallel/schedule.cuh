// Which CTA owns which Q block, and which K/V blocks that Q block needs.
#pragma once

#include "common/mask.cuh"
#include "common/ptx.cuh"
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
    const int64_t fitting = kL2Bytes / bytes * (p.heads_q / (p.heads_kv < 1 ? 1 : p.heads_kv));
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

// The warps that share rows: which of them is this warp, and how they meet.
template <class Traits>
struct Team {
  static constexpr int kThreads = 32 * Traits::kTeam;
  // Through a shuffle, so that the compiler knows them equal for the whole warp.
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  const int index = warp / Traits::kTeam;              // of the team in the CTA
  const int part = warp % Traits::kTeam;               // of this warp in the team
  const int first_row = index * Traits::kRowsPerWarp;  // in the Q block

  // Every warp of the team is here: each sees what the others wrote to shared memory before.
  __device__ __forceinline__ void sync() const {
    if constexpr (Traits::kTeam > 1) named_barrier_sync(1 + index, kThreads);
  }
  // True for all when true for one; otherwise as sync.
  __device__ __forceinline__ bool any(bool condition) const {
    if constexpr (Traits::kTeam > 1) return named_barrier_or(1 + index, kThreads, condition);
    return __any_sync(0xffffffffu, condition);
  }
  // Which 8 columns of O or V are tile n of this warp: the parts take turns, 16 columns at a time.
  __device__ __forceinline__ int column_tile(int n) const {
    return n / 2 * (2 * Traits::kTeam) + 2 * part + n % 2;
  }
};

// The work of one CTA: one Q block of one head, and of one warp: kRowsPerWarp of its rows.
template <class Traits>
struct Tile {
  static constexpr int kBlockKV = Traits::kBlockKV;

  int batch, head, head_kv;
  Sequence sequence;
  int row;       // first row of the Q block
  int warp_row;  // first row of this warp's team
  int last_key;  // one past the last key that any row of the Q block sees
  Range blocks;  // K/V blocks that any row of the Q block sees
  Range clean;   // those that every row sees as a whole

  __device__ __forceinline__ Tile(const ForwardParams& p, const Grid& grid)
      : Tile(p, grid.place(blockIdx.x)) {}

  __device__ __forceinline__ Tile(const ForwardParams& p, Place place)
      : batch(place.head / p.heads_q),
        head(place.head % p.heads_q),
        head_kv(head / (p.heads_q / p.heads_kv)),
        sequence(p, batch),
        row(place.block_q * Traits::kBlockQ),
        warp_row(row + Team<Traits>().first_row),
        last_key(sequence.keys(row, Traits::kBlockQ).end),
        blocks(touched(row, Traits::kBlockQ)),
        clean(filled(row, Traits::kBlockQ)) {}

  __device__ __forceinline__ bool empty() const { return row >= sequence.seqlen_q; }
  __device__ __forceinline__ bool warp_sees_none(int j) const {
    return !touched(warp_row, Traits::kRowsPerWarp).holds(j);
  }
  __device__ __forceinline__ bool warp_sees_all(int j) const {
    return filled(warp_row, Traits::kRowsPerWarp).holds(j);
  }

 private:
  // Blocks of which some, or all, of the rows see some, or all, keys.
  __device__ __forceinline__ Range touched(int first_row, int rows) const {
    const Range keys = sequence.keys(first_row, rows);
    return {keys.begin / kBlockKV, (keys.end + kBlockKV - 1) / kBlockKV};
  }
  __device__ __forceinline__ Range filled(int first_row, int rows) const {
    const Range keys = sequence.common_keys(first_row, rows);
    return {(keys.begin + kBlockKV - 1) / kBlockKV, keys.end / kBlockKV};
  }
};

}  // namespace flash::v2
