// Which CTA owns which tile: a persistent grid walks one list, longest tiles first.
#pragma once

#include "v3_hopper/traits.cuh"

namespace flash::v3 {

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Blocks [begin, end) of keys that a tile visits: producer, guards and consumers agree by this.
template <class Traits>
__device__ __forceinline__ Range key_blocks(const Work& work) {
  const Range keys = work.sequence.keys(work.row, Traits::kBlockQ);
  return {keys.begin / Traits::kBlockKV, ceil_div(keys.end, Traits::kBlockKV)};
}

template <class Traits>
__device__ __forceinline__ bool is_empty(const Work& work) {
  const Range keys = work.sequence.keys(work.row, Traits::kBlockQ);
  return keys.end <= keys.begin;
}

// Of these, the blocks [begin, end) all of whose keys all rows [row, row + kGroupRows) see: no
// mask.
template <class Traits>
__device__ __forceinline__ Range unmasked_blocks(const Sequence& sequence, int row) {
  const int first_key = max(row + kGroupRows - 1 + sequence.first, 0);
  const int end_key = max(min(row + sequence.last + 1, sequence.seqlen_k), 0);
  return {ceil_div(first_key, Traits::kBlockKV), end_key / Traits::kBlockKV};
}

// The blocks of V all of whose rows may reach every query row of the tile. In others a guard looks
// for NaN and Inf. Dense rows behind the last key need none: TMA fills them with zeros.
template <class Traits>
__device__ __forceinline__ Range unguarded_blocks(const Work& work, bool packed) {
  const Range keys = work.sequence.common_keys(work.row, Traits::kBlockQ);
  const bool to_the_last = !packed && keys.end == work.sequence.seqlen_k;
  return {ceil_div(keys.begin, Traits::kBlockKV),
          (keys.end + (to_the_last ? Traits::kBlockKV - 1 : 0)) / Traits::kBlockKV};
}

// A tile of the list: which sequence of the batch, which query head, from which row on.
struct Tile {
  int sequence, head, row;
};
__device__ constexpr Tile kNoTile = {0, -1, 0};

template <class Traits>
__device__ __forceinline__ void describe(Work& work, const ForwardParams& p, const Tile& tile) {
  work.head = tile.head;
  work.row = tile.row;
  if (tile.head < 0) return;
  work.sequence = Sequence(p, tile.sequence);
  work.index = tile.sequence;
  work.batch = p.cu_seqlens_q ? 0 : tile.sequence;
  work.head_kv = unsigned(tile.head) / (unsigned(p.heads_q) / unsigned(p.heads_kv));
  work.unguarded = unguarded_blocks<Traits>(work, p.cu_seqlens_k != nullptr);
  work.poisoned = 0;
}

// The walk of one CTA, executed by the producer warp. Rounds alternate direction, so that a CTA
// with a long tile in one round gets a short one in the next. Where packed sequences differ in
// length, the CTAs claim tile after tile instead.
template <class Traits>
class Schedule {
 public:
  __device__ __forceinline__ Schedule(const Arguments& args, PackedWalk& walk)
      : args_(args), walk_(walk) {
    note(0, 0);
    if (threadIdx.x % kWarp == 0) walk_.sorted = -1;
    __syncwarp();
  }

  // The next tile; all lanes call it and get the same answer.
  __device__ __forceinline__ Tile next() {
    const int ctas = gridDim.x, cta = blockIdx.x;
    int index = round_ * ctas + (round_ % 2 ? ctas - 1 - cta : cta);
    if (args_.schedule.claimed != nullptr && round_ > 0) {
      if (threadIdx.x % kWarp == 0) index = ctas + atomicAdd(args_.schedule.claimed, 1);
      index = __shfl_sync(~0u, index, 0);
    }
    ++round_;
    return args_.p.cu_seqlens_q ? packed(index) : dense(index);
  }

 private:
  __device__ __forceinline__ int count_tiles(int sequence) const {
    if (sequence >= args_.p.batch) return 0;
    const int* begin = args_.p.cu_seqlens_q + sequence;
    return ceil_div(begin[1] - begin[0], Traits::kBlockQ) * args_.p.heads_q;
  }

  // Of the 32 sequences from `first` on, this lane's in order of length.
  __device__ __forceinline__ int sorted(int first) {
    const int lane = threadIdx.x % kWarp;
    if (first != walk_.sorted) {
      const int tiles = count_tiles(first + lane);
      int rank = 0;
#pragma unroll 1
      for (int i = 0; i < kWarp; ++i) {
        const int other = __shfl_sync(~0u, tiles, i);
        rank += other > tiles || (other == tiles && i < lane);
      }
      __syncwarp();
      walk_.order[rank] = lane;
      if (lane == 0) walk_.sorted = first;
      __syncwarp();
    }
    return first + walk_.order[lane];
  }

  __device__ __forceinline__ Tile dense(int index) const {
    const int heads = args_.p.batch * args_.p.heads_q;
    if (index >= heads * args_.schedule.tiles_q) return kNoTile;
    const int folded = args_.schedule.folded_heads, before = folded * args_.schedule.tiles_q;
    Tile tile = index < before ? fold(index)
                               : locate(index - before, heads - folded, args_.schedule.tiles_q);
    if (index >= before) tile.head += folded;
    tile.sequence = unsigned(tile.head) / unsigned(args_.p.heads_q);
    tile.head -= tile.sequence * args_.p.heads_q;
    return tile;
  }

  // Head after head: of the tiles that mirror each other a CTA takes the longer one in one round
  // and the shorter one, whose K and V are in L2 by then, in the next.
  __device__ __forceinline__ Tile fold(unsigned index) const {
    const unsigned ctas = gridDim.x, tiles_q = args_.schedule.tiles_q, half = tiles_q / 2;
    const unsigned rounds = index / (2 * ctas), inside = index - rounds * 2 * ctas;
    const unsigned pair = rounds * ctas + min(inside, 2 * ctas - 1 - inside);
    const unsigned head = pair / half, tile_q = pair - head * half;
    return {0, int(head), int(inside < ctas ? tiles_q - 1 - tile_q : tile_q) * Traits::kBlockQ};
  }

  // Sequences of different lengths: lanes sum the tiles of 32 of them at a time, longest first.
  __device__ __forceinline__ Tile packed(int index) {
    const ForwardParams& p = args_.p;
    const int lane = threadIdx.x % kWarp;
    int first = walk_.first, before = walk_.before;
    for (; first < p.batch; first += kWarp) {
      const int sequence = sorted(first);
      int tiles = count_tiles(sequence);
      int through = tiles;  // tiles of this and all earlier lanes
#pragma unroll 1
      for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(~0u, through, step);
        if (lane >= step) through += other;
      }
      const unsigned after = __ballot_sync(~0u, before + through > index);
      if (after != 0) {
        const int owner = __ffs(after) - 1;
        tiles = __shfl_sync(~0u, tiles, owner);
        through = __shfl_sync(~0u, through, owner);
        Tile tile = locate(index - (before + through - tiles), p.heads_q, tiles / p.heads_q);
        tile.sequence = __shfl_sync(~0u, sequence, owner);
        note(first, before);
        return tile;
      }
      before += __shfl_sync(~0u, through, kWarp - 1);
    }
    return kNoTile;
  }

  __device__ __forceinline__ void note(int first, int before) {
    __syncwarp();  // every lane has read the walk so far
    if (threadIdx.x % kWarp == 0) walk_.first = first, walk_.before = before;
    __syncwarp();
  }

  // Tile `index` of `heads` heads with `tiles_q` query tiles each: sections of heads one after the
  // other; inside a section from the last rows (with causal masks, the most keys) to the first.
  __device__ __forceinline__ Tile locate(unsigned index, unsigned heads, unsigned tiles_q) const {
    const unsigned section_heads = args_.schedule.heads_per_section;
    const unsigned first_head = index / (section_heads * tiles_q) * section_heads;
    const unsigned width = min(section_heads, heads - first_head);
    const unsigned inside = index - first_head * tiles_q;
    const unsigned tile_q = inside / width;
    return {0, int(first_head + inside - tile_q * width),
            int(tiles_q - 1 - tile_q) * Traits::kBlockQ};
  }

  const Arguments& args_;
  int round_ = 0;
  PackedWalk& walk_;
};

}  // namespace flash::v3
