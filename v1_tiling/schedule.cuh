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

// The work of one CTA: one slice of one head, and of one warp: one visit of one of its Q blocks to
// the K/V blocks of a pass, which stay on chip until every Q block of the slice has met them.
template <class Traits>
struct Tile {
  static constexpr int kBlockKV = Traits::kBlockKV;

  int batch, head, head_kv;
  Sequence sequence;
  bool exists;
  int row;       // first row of the slice
  Range blocks;  // K/V blocks that any row of the slice sees
  int resident;  // K/V blocks of a pass

  Range pass;        // the K/V blocks of this visit
  int turn;          // which of its Q blocks this warp brings
  bool last_turn;    // afterwards it is done with the K/V blocks
  int warp_row;      // first row of the Q block
  Range seen;        // K/V blocks of this pass that any of its rows sees
  Range whole;       // K/V blocks that all of its rows see as a whole
  bool first, last;  // no earlier, no later pass matters to the Q block
  bool absent;       // nor does this one: nothing to do

  __device__ __forceinline__ bool warp_sees_all(int j) const {
    return j >= whole.begin && j < whole.end;
  }
  __device__ __forceinline__ bool warp_sees_none(int j) const {
    return j < seen.begin || j >= seen.end;
  }

  // Becomes the first tile of this CTA from `round` on that has rows; returns the round after.
  __device__ __forceinline__ int find(const ForwardParams& p, const Grid& grid, int round) {
    exists = false;
    blocks = {0, 0};
    while (!exists && grid.tile(round) < grid.tiles) take(p, grid, grid.tile(round++));
    return round;
  }

  __device__ __forceinline__ void start_pass(int begin) {
    pass = {begin, min(begin + resident, blocks.end)};
    turn = 0;
  }

  // Warps take the Q blocks of a slice back and forth: even causal work for each.
  __device__ __forceinline__ void start_visit(const Grid& grid) {
    const int warp = threadIdx.x / 32;
    const int q_block = turn * grid.warps + (turn % 2 == 0 ? warp : grid.warps - 1 - warp);
    last_turn = turn == grid.turns - 1;
    warp_row = row + q_block * Traits::kRowsPerWarp;
    const Range keys = sequence.keys(warp_row, Traits::kRowsPerWarp);
    const Range all = {keys.begin / kBlockKV, (keys.end + kBlockKV - 1) / kBlockKV};
    const bool blind = keys.end <= keys.begin;  // it sees no key: O = 0, at the first pass
    const bool outside = warp_row >= sequence.seqlen_q;
    seen = {max(all.begin, pass.begin), blind || outside ? 0 : min(all.end, pass.end)};
    first = blind || pass.begin == blocks.begin || pass.begin <= all.begin;
    last = blind || pass.end == blocks.end || pass.end >= all.end;
    absent = outside || (blind ? pass.begin != blocks.begin : seen.begin >= seen.end);
    // From the first key that the last row sees to the last key that the first row sees.
    const int begin = max(0, warp_row + Traits::kRowsPerWarp - 1 + sequence.first);
    const int end = max(0, min(warp_row + sequence.last + 1, sequence.seqlen_k));
    whole = {(begin + kBlockKV - 1) / kBlockKV, end / kBlockKV};
    if (seen.begin >= seen.end) whole = {0, 0};
  }

 private:
  __device__ __forceinline__ void take(const ForwardParams& p, const Grid& grid, int64_t index) {
    const int heads = p.batch * p.heads_q;
    const int slice = int(index / heads);
    batch = int(index % heads) / p.heads_q;
    head = int(index % heads) % p.heads_q;
    head_kv = head / (p.heads_q / p.heads_kv);
    sequence = Sequence(p, batch);
    row = (grid.last_first ? grid.slices - 1 - slice : slice) * grid.slice;
    exists = row < sequence.seqlen_q;
    if (!exists) return;
    const Range seen = sequence.keys(row, grid.slice);
    blocks.begin = seen.begin / kBlockKV;
    blocks.end = max(blocks.begin, (seen.end + kBlockKV - 1) / kBlockKV);
    const int total = blocks.end - blocks.begin;
    const int passes = max(1, (total + grid.stages - 1) / grid.stages);
    resident = (total + passes - 1) / passes;  // passes of even length
  }
};

// The visits of one warp, one after another: Q blocks inner, passes outer, slices around both. One
// lane writes them down for all.
template <class Traits>
struct Visits {
  Tile<Traits>& tile;
  Tile<Traits>& next;  // the slice after: its K/V blocks already come in
  int round = 0;

  __device__ __forceinline__ Visits(Shared<Traits>& smem, const ForwardParams& p, const Grid& grid)
      : tile(smem.template tile<Tile<Traits>>(0)), next(smem.template tile<Tile<Traits>>(1)) {
    if (threadIdx.x % 32 == 0) {
      round = next.find(p, grid, 0);
      tile.blocks = tile.pass = {0, 0};
      tile.turn = grid.turns - 1;
    }
    __syncwarp();  // every lane sees the tiles
  }

  __device__ __forceinline__ bool advance(Shared<Traits>& smem, const ForwardParams& p,
                                          const Grid& grid) {
    const bool pass_ends = tile.turn == grid.turns - 1;
    const bool slice_ends = pass_ends && tile.pass.end >= tile.blocks.end;
    if (slice_ends && !next.exists) return false;
    const int begin = slice_ends ? next.blocks.begin : tile.pass.end;
    if (pass_ends) smem.ring.advance(tile.pass.end);
    if (slice_ends) smem.ring.rename(begin);
    __syncwarp();  // no lane reads the last visit any more
    if (threadIdx.x % 32 == 0) {
      if (slice_ends) {
        tile = next;
        round = next.find(p, grid, round);
      }
      if (pass_ends) {
        tile.start_pass(begin);
      } else {
        ++tile.turn;
      }
      tile.start_visit(grid);
    }
    __syncwarp();  // every lane sees the visit
    return true;
  }
};

}  // namespace flash::v1
