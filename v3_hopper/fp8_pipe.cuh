// A consumer's side of the rings in FP8: wait for what has arrived, give it back, take turns.
#pragma once

#include "v3_hopper/fp8_traits.cuh"
#include "v3_hopper/schedule.cuh"

namespace flash::v3::fp8 {

// Waits return once something has arrived; releases are one arrival per warpgroup (of K: per warp),
// legal once the GEMM that read the slot has been waited for.
template <class Traits>
struct Pipes {
  typename Traits::Shared& shared;
  const int consumer;
  Counter tile, block;

  __device__ __forceinline__ const Work& wait_work() const {
    const int slot = tile.slot<Traits::kWorkSlots>();
    shared.work_full[slot].wait(tile.parity<Traits::kWorkSlots>());
    return shared.work[slot];
  }
  __device__ __forceinline__ const Work& next_work() {
    ++tile.passed;
    return wait_work();
  }
  // A tile is finished: this one, or where O leaves under the next tile's first S, the one before.
  __device__ __forceinline__ void release_work() {
    sync();  // every thread has read its last of it
    const Counter done = {tile.passed - Traits::kStagesO};
    if (leader()) shared.work_empty[done.slot<Traits::kWorkSlots>()].arrive();
    if (!Traits::kStagesO) ++tile.passed;
  }

  __device__ __forceinline__ void wait_q() const {
    shared.q_full[slot_q()][consumer].wait(tile.parity<Traits::kStagesQ>());
  }
  __device__ __forceinline__ float to_log2() const {
    return shared.to_log2[tile.slot<Traits::kWorkSlots>()][consumer];
  }
  __device__ __forceinline__ unsigned char* tile_q() const { return shared.q[slot_q()][consumer]; }
  __device__ __forceinline__ void release_q() const {
    if (leader()) shared.q_empty[slot_q()][consumer].arrive();
  }

  __device__ __forceinline__ void wait_k() const {
    shared.k_full[slot()].wait(block.parity<Traits::kStages>());
  }
  // Looked at ahead of time: has the block after this one arrived?
  __device__ __forceinline__ bool has_next_k() const {
    const Counter next = {block.passed + 1};
    return shared.k_full[next.slot<Traits::kStages>()].test(next.parity<Traits::kStages>());
  }
  __device__ __forceinline__ const unsigned char* tile_k() const { return shared.k[slot()]; }
  __device__ __forceinline__ const BlockScales& scales() const { return shared.scales[slot()]; }
  // The scale of the tile's last block of V is O's at the end.
  __device__ __forceinline__ void keep_units() const {
    if (leader()) shared.units[consumer] = scales().v;
  }
  __device__ __forceinline__ float units() const { return shared.units[consumer]; }
  // By every warp, for each has read the scales.
  __device__ __forceinline__ void release_k() {
    __syncwarp();
    if (elect_one()) shared.k_empty[slot()].arrive();
  }

  __device__ __forceinline__ void wait_v() const {
    shared.v_full[slot()].wait(block.parity<Traits::kStages>());
  }
  __device__ __forceinline__ const unsigned char* tile_v() const { return shared.v[slot()]; }
  __device__ __forceinline__ void release_v(bool keeps = false) {
    if (leader() && !keeps) shared.v_empty[slot()].arrive();
    ++block.passed;
  }

  // Where O passes through on its way out: the last block's V for the last consumer, V of the block
  // before for the one before, since all others have used it.
  // Memory of its own where V is not transposed: then nothing is given back.
  __device__ __forceinline__ unsigned char* tile_o() const {
    if constexpr (Traits::kKeysContiguous) return shared.raw[consumer];
    return shared.v[slot_o()];
  }
  __device__ __forceinline__ void release_o() const {
    if (Traits::kKeysContiguous || !leader()) return;
    wait_stores_read<0>();
    shared.v_empty[slot_o()].arrive();
  }

  // Consumers issue their GEMMs in turn, so that the softmax of one runs under the GEMMs of
  // another.
  __device__ __forceinline__ void first_turn() const {
    if (Traits::kTakesTurns && consumer == Traits::kConsumers - 1)
      named_arrive(kTurn, 2 * kGroupThreads);
  }
  __device__ __forceinline__ void take_turn() const {
    if constexpr (Traits::kTakesTurns) {
      named_sync(kTurn + consumer, 2 * kGroupThreads);
    } else {
      __syncwarp();  // what follows is not worked out ahead of it: there are no registers for that
    }
  }
  __device__ __forceinline__ void give_turn() const {
    if (!Traits::kTakesTurns) return;
    named_arrive(kTurn + (consumer + 1) % Traits::kConsumers, 2 * kGroupThreads);
  }

  // Waits for the other threads of this warpgroup.
  __device__ __forceinline__ void sync() const { named_sync(kDone + consumer, kGroupThreads); }

 private:
  __device__ __forceinline__ int slot_q() const { return tile.slot<Traits::kStagesQ>(); }
  __device__ __forceinline__ int slot_o() const {
    return (block.passed - Traits::kConsumers + consumer) % Traits::kStages;
  }
  __device__ __forceinline__ int slot() const { return block.slot<Traits::kStages>(); }
  __device__ __forceinline__ bool leader() const { return threadIdx.x % kGroupThreads == 0; }
};

}  // namespace flash::v3::fp8
