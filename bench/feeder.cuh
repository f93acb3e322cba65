// v3 without warp specialization: no producer warpgroup; the first thread of all announces tiles
// and issues all loads between its own steps, into the same rings.
#pragma once

#include <new>

#include "v3_hopper/load.cuh"

namespace flash::v3 {

// Only dense tensors, no tile without keys and no guard of V: what the ablation times. It lies in
// shared memory, for one thread alone needs it and every thread would keep registers for it.
template <class Traits>
struct Feeder {
  static_assert(Traits::kStagesQ > 1, "the next tile's Q is loaded beside this one's");
  Loader<Traits> load;
  Schedule<Traits> schedule;
  Ring<Traits::kWorkSlots> slot;
  const Work* at = nullptr;        // the tile that is being loaded
  int block = 0, first_block = 0;  // its last loaded block of K, whose V is still to come
  int fed = 0, steps = 0;          // blocks of K loaded, and multiplied
  int opened = 0, entered = 0;     // tiles announced, and begun by this thread's warpgroup
  bool ended = false;

  __device__ __forceinline__ static Feeder& make(const Arguments& args,
                                                 typename Traits::Shared& shared) {
    __shared__ alignas(16) unsigned char memory[256];
    static_assert(sizeof(Feeder) <= sizeof(memory));
    if (threadIdx.x < kWarp) {  // the schedule begins with a meeting of a warp
      new (memory) Feeder{{args, shared}, {args, shared.walk}};
      __syncwarp();
    }
    return reinterpret_cast<Feeder&>(memory);
  }

  __device__ __forceinline__ void enter() {
    if (threadIdx.x == 0) ++entered;
  }

  // Fills what has become free. A slot is waited for when it is due, while this warpgroup has a
  // product under way; others need nothing of it to give the slot back. Q has room for one tile
  // ahead.
  __device__ __forceinline__ void feed(int multiplied) {
    if (threadIdx.x == 0) {
      steps += multiplied;
      while (!ended && fed < steps + Traits::kStages) {
        if (at != nullptr && block > first_block) {
          --block;
          load.load_k(*at, block);
          load.load_v(*at, block + 1);
        } else if (opened <= entered) {
          open_tile();
        } else {
          break;
        }
        ++fed;
      }
    }
    __syncwarp();
  }

 private:
  // The next tile's first K and its Q, then the last V of the tile before.
  __device__ __forceinline__ void open_tile() {
    const Tile tile = schedule.next();
    load.shared.work_empty[slot.slot].wait(slot.parity ^ 1);
    Work& work = load.shared.work[slot.slot];
    describe<Traits>(work, load.args.p, tile);
    load.shared.work_full[slot.slot].arrive();
    slot.advance();
    ended = tile.head < 0;
    const Work* previous = at;
    const int last_v = block;
    if (!ended) {
      const Range blocks = key_blocks<Traits>(work);
      at = &work;
      block = blocks.end - 1;
      first_block = blocks.begin;
      ++opened;
      load.load_k(work, block);
      load.load_q(work);
    }
    if (previous != nullptr) load.load_v(*previous, last_v);
  }
};

}  // namespace flash::v3
