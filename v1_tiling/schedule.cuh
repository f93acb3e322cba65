// Which CTA owns which slice of Q, and which K/V blocks stay on chip while its rows stream past.
#pragma once

#include "common/mask.cuh"
#include "v1_tiling/traits.cuh"

namespace flash::v1 {

// As many CTAs as run at once; each takes slices of query rows, one after another, through all
// their K/V blocks. O, m and l of the slices under way then stay in L2.
struct Grid {
  int warps;
  int stages;  // K/V blocks on chip
  int turns;   // Q blocks of each warp in a slice
  int slice;   // query rows: turns * warps * kRowsPerWarp
  int slices;  // per head
  int ctas;
  int64_t tiles;    // slices of all heads
  bool last_first;  // the last slice sees the most keys (causal)

  // The longest slices go first, and every other round runs backwards: even work for each CTA.
  __device__ __forceinline__ int64_t tile(int round) const {
    const int turn = round % 2 == 0 ? blockIdx.x : ctas - 1 - blockIdx.x;
    return int64_t(round) * ctas + turn;
  }
};

// The work of one CTA: one slice of one head, and of one warp: its Q block of the current visit.
template <class Traits>
struct Tile {
  static constexpr int kBlockKV = Traits::kBlockKV;

  int batch, head, head_kv;
  Sequence sequence;
  int row;       // first row of the slice
  Range blocks;  // K/V blocks that any row of the slice sees
  int resident;  // K/V blocks of a pass: they stay on chip while every Q block visits them

  int warp_row;      // first row of this warp's Q block
  int q_block;       // its number in the slice
  Range keys;        // keys that any of its rows sees
  bool first, last;  // no earlier, no later pass is of use to it
  bool absent;       // this pass is of no use to it

  __device__ __forceinline__ Tile(const ForwardParams& p, const Grid& grid, int64_t index)
      : Tile(p, grid, int(index / (p.batch * p.heads_q)), int(index % (p.batch * p.heads_q))) {}

  __device__ __forceinline__ bool empty() const { return row >= sequence.seqlen_q; }

  __device__ __forceinline__ Range first_pass() const {
    return {blocks.begin, min(blocks.begin + resident, blocks.end)};
  }
  __device__ __forceinline__ Range next_pass(Range pass) const {
    return {pass.end, min(pass.end + resident, blocks.end)};
  }

  // The Q block of this warp at its turn number `turn`. Warps take the blocks of a slice back and
  // forth: even causal work for each.
  static __device__ __forceinline__ int q_block_of(const Grid& grid, int turn) {
    const int warp = threadIdx.x / 32;
    return turn * grid.warps + (turn % 2 == 0 ? warp : grid.warps - 1 - warp);
  }

  // This warp turns to that Q block, which meets the K/V blocks of `pass`.
  __device__ __forceinline__ void visit(const Grid& grid, Range pass, int turn) {
    __syncwarp();  // no lane reads the last visit any more
    q_block = q_block_of(grid, turn);
    warp_row = row + q_block * Traits::kRowsPerWarp;
    keys = sequence.keys(warp_row, Traits::kRowsPerWarp);
    const bool blind = keys.end <= keys.begin;  // it sees no key: O = 0, at the first pass
    first = blind || pass.begin == blocks.begin || pass.begin * kBlockKV <= keys.begin;
    last = blind || pass.end == blocks.end || pass.end * kBlockKV >= keys.end;
    absent = warp_row >= sequence.seqlen_q ||
             (blind ? pass.begin != blocks.begin
                    : pass.begin * kBlockKV >= keys.end || pass.end * kBlockKV <= keys.begin);
    __syncwarp();  // every lane sees the visit
  }

  __device__ __forceinline__ bool warp_sees_all(int j) const {
    return sequence.all_visible(warp_row, Traits::kRowsPerWarp, j * kBlockKV, kBlockKV);
  }
  __device__ __forceinline__ bool warp_sees_none(int j) const {
    return absent || j * kBlockKV >= keys.end || (j + 1) * kBlockKV <= keys.begin;
  }

 private:
  __device__ __forceinline__ Tile(const ForwardParams& p, const Grid& grid, int slice, int any_head)
      : batch(any_head / p.heads_q),
        head(any_head % p.heads_q),
        head_kv(head / (p.heads_q / p.heads_kv)),
        sequence(p, batch),
        row((grid.last_first ? grid.slices - 1 - slice : slice) * grid.slice) {
    const Range seen = sequence.keys(row, grid.slice);
    blocks.begin = seen.begin / kBlockKV;
    blocks.end = max(blocks.begin, (seen.end + kBlockKV - 1) / kBlockKV);
    const int total = blocks.end - blocks.begin;
    const int passes = max(1, (total + grid.stages - 1) / grid.stages);
    resident = (total + passes - 1) / passes;  // passes of even length
  }
};

}  // namespace flash::v1
