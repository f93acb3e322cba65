// Global -> shared by TMA: one warp keeps the rings of Q, K and V full; guards look through V.
#pragma once

#include "v3_hopper/schedule.cuh"
#include "v3_hopper/store.cuh"

namespace flash::v3 {

// Rows of the tensors, where sequences may be packed one behind the other.
__device__ __forceinline__ int query_row(const Work& work, int group) {
  return int(work.sequence.row_q) + work.row + group * kGroupRows;
}
template <class Traits>
__device__ __forceinline__ int key_row(const Work& work, int block) {
  return int(work.sequence.row_k) + block * Traits::kBlockKV;
}

// What the producer warp carries through the whole kernel.
template <class Traits>
struct Loader {
  using Shared = typename Traits::Shared;
  const Arguments& args;
  Shared& shared;
  Ring<Traits::kStagesQ> q;
  Ring<Traits::kStages> k, v;

  __device__ __forceinline__ void load_q(const Work& at) {
    const int row = query_row(at, 0), head = at.head, batch = at.batch;
#pragma unroll
    for (int group = 0; group < Traits::kConsumers; ++group) {
      shared.q_empty[q.slot][group].wait(q.parity ^ 1);
      if (elect_one()) {
        Barrier& full = shared.q_full[q.slot][group];
        full.arrive_expect(Traits::kBytesQ);
        load_rows<kGroupRows, Traits::kChunks>(shared.q[q.slot][group], args.q,
                                               row + group * kGroupRows, head, batch, full);
      }
    }
    q.advance();
  }

  __device__ __forceinline__ void load_k(const Work& at, int block) {
    shared.k_empty[k.slot].wait(k.parity ^ 1);
    if (elect_one()) {
      Barrier& full = shared.k_full[k.slot];
      full.arrive_expect(Traits::kBytesK);
      load_rows<Traits::kBlockKV, Traits::kChunks>(
          shared.k[k.slot], args.k, key_row<Traits>(at, block), at.head_kv, at.batch, full);
    }
    k.advance();
  }

  // V counts as full after one arrival for the copy and one of each guard; without need of a guard
  // the producer arrives for them.
  __device__ __forceinline__ void load_v(const Work& at, int block) {
    shared.v_empty[v.slot].wait(v.parity ^ 1);
    const bool guarded = !at.unguarded.holds(block);
    if (elect_one()) {
      Barrier& full = guarded ? shared.v_landed[v.slot] : shared.v_full[v.slot];
      full.arrive_expect(Traits::kBytesV);
      shared.v_full[v.slot].arrive(guarded ? 1 : kGuardWarps);
      load_rows<Traits::kBlockKV, Traits::kChunksV>(
          shared.v[v.slot], args.v, key_row<Traits>(at, block), at.head_kv, at.batch, full);
    }
    v.advance();
  }

 private:
  template <int kRows, int kChunkCount>
  __device__ __forceinline__ void load_rows(unsigned char* tile, const CUtensorMap& map, int row,
                                            int head, int batch, Barrier& full) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunkCount; ++chunk) {
      load_box(tile + chunk * kRows * kChunkBytes, map,
               {chunk * Traits::kChunkColumns, row, head, batch}, full);
    }
  }
};

// Announces tile after tile; those whose rows see no key are finished here.
template <class Traits>
__device__ __forceinline__ void announce(const Arguments& args, typename Traits::Shared& shared) {
  Schedule<Traits> schedule(args, shared.walk);
  Ring<Traits::kWorkSlots> slot;
  for (;;) {
    const Tile tile = schedule.next();
    Work& work = shared.work[slot.slot];
    shared.work_empty[slot.slot].wait(slot.parity ^ 1);
    if (threadIdx.x % kWarp == 0) describe<Traits>(work, args.p, tile);
    __syncwarp();
    if (tile.head >= 0 && is_empty<Traits>(work)) {
      store_nothing<Traits>(args.p, work);
      __syncwarp();  // before the slot is written again
      continue;
    }
    if (threadIdx.x % kWarp == 0) shared.work_full[slot.slot].arrive();
    slot.advance();
    if (tile.head < 0) return;
    if (args.schedule.claimed != nullptr && args.p.seqlen_q >= kLateClaimRows) {
      const bool wraps = slot.slot < 2;
      const int before = wraps ? slot.slot + Traits::kWorkSlots - 2 : slot.slot - 2;
      shared.work_empty[before].wait(wraps ? slot.parity ^ 1 : slot.parity);
    }
  }
}

// Loads everything in the order in which consumers need it: the first K and the Q of a tile before
// the last V of the tile before.
template <class Traits>
__device__ __forceinline__ void produce(const Arguments& args, typename Traits::Shared& shared) {
  Loader<Traits> load{args, shared};
  Ring<Traits::kWorkSlots> slot, previous;
  int last_v = -1;  // block of V that the previous tile still lacks
  for (;; slot.advance()) {
    shared.work_full[slot.slot].wait(slot.parity);
    const Work& work = shared.work[slot.slot];
    const bool more = work.head >= 0;
    const Range blocks = more ? key_blocks<Traits>(work) : Range{0, 0};
    if (more) {
      load.load_k(work, blocks.end - 1);
      if (Traits::kStagesQ > 1) load.load_q(work);  // else it waits for that V to be used
    }
    if (last_v >= 0) {
      load.load_v(shared.work[previous.slot], last_v);
      __syncwarp();
      if (threadIdx.x == 0) shared.work_empty[previous.slot].arrive();
      previous.advance();
    }
    if (!more) return;
    if (Traits::kStagesQ == 1) load.load_q(work);
    for (int j = blocks.end - 2; j >= blocks.begin; --j) {
      load.load_k(work, j);
      load.load_v(work, j + 1);
    }
    last_v = blocks.begin;
  }
}

}  // namespace flash::v3
