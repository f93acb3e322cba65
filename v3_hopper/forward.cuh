// The algorithm: a producer warp streams K and V past consumer warpgroups that take turns at the
// tensor cores, and each hides its softmax under its own O += P V and the others' GEMMs.
#pragma once

#include <type_traits>

#include "v3_hopper/gemm.cuh"
#include "v3_hopper/guard.cuh"
#include "v3_hopper/load.cuh"
#include "v3_hopper/softmax.cuh"
#include "v3_hopper/store.cuh"
#include "v3_hopper/stream.cuh"

namespace flash::v3 {

// Announces tile after tile; those whose rows see no key are finished here.
template <class Traits>
__device__ __forceinline__ void announce(const Arguments& args, typename Traits::Shared& shared) {
  Schedule<Traits> schedule(args, shared.walk);
  Ring<Traits::kWorkSlots> slot;
  for (;;) {
    const Tile tile = schedule.next();
    Work& work = shared.work[slot.slot];
    shared.work_empty[slot.slot].wait(slot.parity ^ 1);
    if (threadIdx.x % kWarp == 0) describe(work, args.p, tile);
    __syncwarp();
    if (tile.head >= 0 && is_empty<Traits>(work)) {
      store_nothing<Traits>(args.p, work);
      __syncwarp();  // before the slot is written again
      continue;
    }
    if (threadIdx.x % kWarp == 0) {
      if (tile.head >= 0) prefetch_tile<Traits>(args, work);
      shared.work_full[slot.slot].arrive();
    }
    slot.advance();
    if (tile.head < 0) return;
  }
}

// Loads everything in the order in which consumers need it.
template <class Traits>
__device__ __forceinline__ void produce(const Arguments& args, typename Traits::Shared& shared) {
  Loader<Traits> load{args, shared};
  Ring<Traits::kWorkSlots> slot;
  for (;; slot.advance()) {
    shared.work_full[slot.slot].wait(slot.parity);
    const Work& work = shared.work[slot.slot];
    if (work.head < 0) return;
    const Range blocks = key_blocks<Traits>(work);
    load.load_k(work, blocks.end - 1);
    load.load_q(work);
    for (int j = blocks.end - 2; j >= blocks.begin; --j) {
      load.load_k(work, j);
      load.load_v(work, j + 1);
    }
    load.load_v(work, blocks.begin);
    __syncwarp();
    if (threadIdx.x == 0) shared.work_empty[slot.slot].arrive();
  }
}

// One consumer warpgroup: 64 rows of every tile. Blocks of all tiles form one stream, so that a new
// tile's first scores are computed under the last O += P V of the tile before.
template <class Traits>
__device__ __forceinline__ void consume(const Arguments& args, typename Traits::Shared& shared,
                                        int consumer) {
  const Scale scale = make_scale<Traits>(args.p);
  Pipes<Traits> pipe{shared, consumer};
  Stream<Traits> next(pipe);          // the block whose scores come next
  float rO[Traits::kHeadDimV / 2];    // (64, dv)
  float rS[Traits::kBlockKV / 2];     // (64, kBlockKV): S, then P
  uint32_t rP[Traits::kBlockKV / 4];  // (64, kBlockKV): P, 16-bit
  RowState state = kNoRows;
  float correction[2];

  auto mask_boundary = [&] {
    feature<Traits>(rS, scale);
    if (next.boundary()) mask<Traits>(rS, next.work->sequence, next.row(), next.key());
  };
  auto finish = [&](const Work& work, RowState rows) {
    float lse[2];
    normalize<Traits>(rO, rows, lse, scale);
    store_state<Traits>(args, work, consumer, next.thread_row, pipe.tile_o(), rO, lse);
    if (work.poisoned) {
      pipe.sync();  // all rows are written
      restore_poison<Traits>(args.p, work, work.row + next.group_row);
    }
    pipe.staged_o = Traits::kStagesO;
    pipe.release_work(work);
    clear(rO);
  };

  // Issues S of the block `next` and O += P V of the block before it, and does the softmax of the
  // one under the other; a block that opens a tile also sees the last one off.
  auto step = [&](auto opens_tile, const Work& previous) {
    const auto* sK = pipe.wait_k();
    pipe.take_turn();
    gemm_qk<Traits>(rS, pipe.tile_q(), sK);
    gemm_pv<Traits>(rO, rP, pipe.wait_v());
    pipe.give_turn();
    wgmma_wait<1>();  // S is there
    pin(rS);
    pipe.release_k();
    mask_boundary();
    const RowState finished = state;
    if (opens_tile) state = kNoRows;
    const bool risen = update<Traits>(rS, state, correction, scale);
    exponentials<Traits>(rS, state, scale);
    pin(rS);
    if (!next.last()) pipe.wait_k();  // and no exponential sinks below the wait for O
    wgmma_wait<0>();                  // O is there, P and V are free
    pin(rO);
    pipe.release_v();
    if (opens_tile) {
      finish(previous, finished);
    } else if (risen) {
      rescale<Traits>(rO, correction);
    }
    pack<Traits>(rP, rS);
  };

  clear(rO);
  pipe.first_turn();
  if (!next.open_tile()) return;
  gemm_qk<Traits>(rS, pipe.tile_q(), pipe.wait_k());
  wgmma_wait<0>();
  pin(rS);
  pipe.release_k();
  mask_boundary();
  update<Traits>(rS, state, correction, scale);
  exponentials<Traits>(rS, state, scale);
  pack<Traits>(rP, rS);
  for (;;) {
    const Work& work = *next.work;
    while (!next.last()) {
      next.advance();
      step(std::false_type{}, work);
      pipe.release_o();
    }
    pipe.release_o();  // O of the tile before has left; the coming Q may wait for its slot
    pipe.close_q();
    if (!next.open_tile()) break;
    step(std::true_type{}, work);
  }
  gemm_pv<Traits>(rO, rP, pipe.wait_v());
  wgmma_wait<0>();
  pin(rO);
  pipe.release_v();
  finish(*next.work, state);
  pipe.release_o();  // shared memory stays until TMA has read it
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
  const int warpgroup = __shfl_sync(~0u, int(threadIdx.x) / kGroupThreads, 0);
  if (threadIdx.x == 0) init_pipes<Traits>(shared);
  __syncthreads();
  if (warpgroup == 0) {
    shrink_registers<Traits::kProducerRegisters>();
    const int role = threadIdx.x / kWarp;
    if (role == kLoads) {
      produce<Traits>(args, shared);
    } else if (role == kSchedules) {
      announce<Traits>(args, shared);
    } else {
      guard<Traits>(args, shared);
    }
  } else {
    grow_registers<Traits::kConsumerRegisters>();
    consume<Traits>(args, shared, warpgroup - 1);
  }
}

}  // namespace flash::v3
