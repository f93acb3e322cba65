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

// May this block of V hold rows that must not reach every query row of the tile? Then a guard looks
// for NaN and Inf in it. Dense rows behind the last key need none: TMA fills them with zeros.
template <class Traits>
__device__ __forceinline__ bool needs_guard(const Work& work, int block, bool packed) {
  const int key = block * Traits::kBlockKV;
  const int keys = min(Traits::kBlockKV, work.sequence.seqlen_k - key);
  return !work.sequence.all_visible(work.row, Traits::kBlockQ, key, keys) ||
         (packed && keys < Traits::kBlockKV);
}

// The walk of one CTA, executed by the producer warp. Rounds alternate direction, so that a CTA
// with a long tile in one round gets a short one in the next.
template <class Traits>
class Schedule {
 public:
  __device__ __forceinline__ explicit Schedule(const Arguments& args) : args_(args) {}

  // The next tile; head is -1 after the last one. All lanes call it and get the same answer.
  __device__ __forceinline__ Work next() {
    const int ctas = gridDim.x, cta = blockIdx.x;
    const int64_t index = int64_t(round_) * ctas + (round_ % 2 ? ctas - 1 - cta : cta);
    ++round_;
    return args_.p.cu_seqlens_q ? packed(index) : dense(index);
  }

 private:
  __device__ __forceinline__ Work dense(int64_t index) const {
    const ForwardParams& p = args_.p;
    const int heads = p.batch * p.heads_q;
    if (index >= int64_t(heads) * args_.schedule.tiles_q) return none();
    Work work = locate(int(index), heads, args_.schedule.tiles_q);
    work.batch = work.head / p.heads_q;
    work.head -= work.batch * p.heads_q;
    work.head_kv = work.head / (p.heads_q / p.heads_kv);
    work.sequence = Sequence(p, work.batch);
    return work;
  }

  // Sequences of different lengths: lanes sum the tiles of 32 of them at a time.
  __device__ __forceinline__ Work packed(int64_t index) {
    const ForwardParams& p = args_.p;
    const int lane = threadIdx.x % kWarp;
    for (; batch_ < p.batch; batch_ += kWarp) {
      const int batch = batch_ + lane;
      int tiles = 0;
      if (batch < p.batch) {
        const int rows = p.cu_seqlens_q[batch + 1] - p.cu_seqlens_q[batch];
        tiles = ceil_div(rows, Traits::kBlockQ) * p.heads_q;
      }
      int through = tiles;  // tiles of this and all earlier lanes
      for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(~0u, through, step);
        if (lane >= step) through += other;
      }
      const unsigned after = __ballot_sync(~0u, before_ + through > index);
      if (after != 0) {
        const int owner = __ffs(after) - 1;
        tiles = __shfl_sync(~0u, tiles, owner);
        through = __shfl_sync(~0u, through, owner);
        const int inside = int(index - (before_ + through - tiles));
        Work work = locate(inside, p.heads_q, tiles / p.heads_q);
        work.head_kv = work.head / (p.heads_q / p.heads_kv);
        work.sequence = Sequence(p, batch_ + owner);
        return work;
      }
      before_ += __shfl_sync(~0u, through, kWarp - 1);
    }
    return none();
  }

  // Tile `index` of `heads` heads with `tiles_q` query tiles each: sections of heads one after the
  // other; inside a section from the last rows (with causal masks, the most keys) to the first.
  __device__ __forceinline__ Work locate(int index, int heads, int tiles_q) const {
    const int section_heads = args_.schedule.heads_per_section;
    const int section = index / (section_heads * tiles_q);
    const int inside = index - section * section_heads * tiles_q;
    const int width = min(section_heads, heads - section * section_heads);
    Work work = none();
    work.head = section * section_heads + inside % width;
    work.row = (tiles_q - 1 - inside / width) * Traits::kBlockQ;
    return work;
  }

  __device__ __forceinline__ Work none() const { return {Sequence(args_.p, 0), 0, -1, 0, 0, 0}; }

  const Arguments& args_;
  int round_ = 0;
  int batch_ = 0;       // first sequence of the window that packed() looks at
  int64_t before_ = 0;  // tiles of all sequences before it
};

}  // namespace flash::v3
