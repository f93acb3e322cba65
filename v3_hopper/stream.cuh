// What a consumer works through: the key blocks of all tiles of its CTA, one after the other.
#pragma once

#include "v3_hopper/pipe.cuh"

namespace flash::v3 {

template <class Traits>
struct Stream {
  const int group_row, thread_row;  // of this warpgroup and this thread inside a tile
  const Work* work = nullptr;       // the current tile
  int block = 0, first_block = 0;   // blocks are visited from the last to the first
  Range unmasked = {0, 0};

  __device__ __forceinline__ explicit Stream(int consumer)
      : group_row(consumer * kGroupRows),
        thread_row(group_row + threadIdx.x % kGroupThreads / kWarp * 16 + threadIdx.x % kWarp / 4) {
  }

  // The next tile, with its Q; false at the end of the stream.
  __device__ __forceinline__ bool open_tile(Pipes<Traits>& pipe) {
    const Work& candidate = pipe.wait_work();
    if (candidate.head < 0) return false;
    work = &candidate;
    const Range blocks = key_blocks<Traits>(candidate);
    block = blocks.end - 1;
    first_block = blocks.begin;
    unmasked = unmasked_blocks<Traits>(candidate.sequence, candidate.row + group_row);
    pipe.wait_q();
    return true;
  }

  __device__ __forceinline__ void advance() { --block; }

  __device__ __forceinline__ bool last() const { return block == first_block; }
  __device__ __forceinline__ int row() const { return work->row + thread_row; }
  __device__ __forceinline__ int key() const { return block * Traits::kBlockKV; }
  __device__ __forceinline__ bool boundary() const {
    return block < unmasked.begin || block >= unmasked.end;
  }
};

}  // namespace flash::v3
