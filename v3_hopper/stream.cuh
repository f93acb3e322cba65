// What a consumer works through: the key blocks of all tiles of its CTA, one after the other.
#pragma once

#include "v3_hopper/pipe.cuh"

namespace flash::v3 {

template <class Traits>
struct Stream {
  const int group_row;             // of this warpgroup inside a tile
  const Work* work = nullptr;      // the current tile
  int block = 0, first_block = 0;  // blocks are visited from the last to the first
  Range unmasked = {0, 0};

  __device__ __forceinline__ explicit Stream(int consumer) : group_row(consumer * kGroupRows) {}

  // The next tile, with its Q; false at the end of the stream.
  __device__ __forceinline__ bool open_tile(Pipes<Traits>& pipe) {
    const Work& candidate = pipe.wait_work();
    if (candidate.head < 0) return false;
    work = &candidate;
    const Range blocks = key_blocks<Traits>(candidate);
    first_block = blocks.begin;
    block = blocks.end - 1;
    if constexpr (Traits::kSkips) {
      const int skipped = count_skipped(candidate, blocks);
      block -= skipped;
#pragma unroll 1
      for (int i = 0; i < skipped; ++i) {
        pipe.wait_k();
        __syncwarp();  // one lane gives back what all have seen
        pipe.release_k();
        pipe.take_turn();  // for nothing, but the other consumer counts on it
        pipe.give_turn();
      }
    }
    unmasked = unmasked_blocks<Traits>(candidate.sequence, candidate.row + group_row);
    pipe.wait_q();
    return true;
  }

  // Gives back V of the skipped blocks, once V of the tile before has been used.
  __device__ __forceinline__ void skip_v(Pipes<Traits>& pipe) const {
    if constexpr (Traits::kSkips) {
      const int last = key_blocks<Traits>(*work).end - 1;
#pragma unroll 1
      for (int i = block; i < last; ++i) {
        pipe.wait_v();
        pipe.sync();  // a warp that came later would wait for a phase that is over
        pipe.release_v();
      }
    }
  }

  __device__ __forceinline__ void advance() { --block; }

  __device__ __forceinline__ bool last() const { return block == first_block; }
  // Of this thread's two rows, the first inside the tile, and in the sequence.
  __device__ __forceinline__ int thread_row() const {
    return group_row + threadIdx.x % kGroupThreads / kWarp * 16 + threadIdx.x % kWarp / 4;
  }
  __device__ __forceinline__ int row() const { return work->row + thread_row(); }
  __device__ __forceinline__ int key() const { return block * Traits::kBlockKV; }
  __device__ __forceinline__ bool boundary() const {
    return block < unmasked.begin || block >= unmasked.end;
  }

 private:
  // At least one block is visited, and fewer are skipped than a ring has stages: the producer loads
  // V between K and K, and skipped V keep their slots until the tile before has ended.
  __device__ __forceinline__ int count_skipped(const Work& tile, Range blocks) const {
    const int row = tile.row + group_row;
    const bool exists = row < tile.sequence.seqlen_q;
    const int end = exists ? tile.sequence.keys(row, kGroupRows).end : 0;
    const int unseen = blocks.end - max(ceil_div(end, Traits::kBlockKV), blocks.begin + 1);
    return min(max(unseen, 0), Traits::kStages - 1);
  }
};

}  // namespace flash::v3
