// The algorithm: a producer warp streams K and V past consumer warpgroups that take turns at the
// tensor cores, and each hides its softmax under its own O += P V and the others' GEMMs.
#pragma once

#include "v3_hopper/gemm.cuh"
#include "v3_hopper/guard.cuh"
#include "v3_hopper/load.cuh"
#include "v3_hopper/softmax.cuh"
#include "v3_hopper/store.cuh"
#include "v3_hopper/stream.cuh"

namespace flash::v3 {

// One consumer warpgroup: 64 rows of every tile; the blocks of all tiles form one stream.
template <class Traits>
struct Consumer {
  const Arguments& args;
  typename Traits::Shared& shared;
  const int consumer;
  const Scale scale = make_scale<Traits>(args.p);
  Pipes<Traits> pipe = {shared, consumer};
  Stream<Traits> next{consumer};      // the block whose scores come next
  float rO[Traits::kHeadDimV / 2];    // (64, dv)
  float rS[Traits::kBlockKV / 2];     // (64, kBlockKV): S, then P
  uint32_t rP[Traits::kBlockKV / 4];  // (64, kBlockKV): P, 16-bit
  RowState state = kNoRows;
  float correction[2];

  __device__ __forceinline__ void mask_boundary() {
    feature<Traits>(rS, scale);
    if (next.boundary()) mask<Traits>(rS, next.work->sequence, next.row(), next.key());
  }

  __device__ __forceinline__ void finish(const Work& work, RowState rows) {
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
  }

  // S of block `next`, O += P V of the one before, softmax of the one under the other.
  template <bool kOpensTile>
  __device__ __forceinline__ void step(const Work& previous) {
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
    if (kOpensTile) state = kNoRows;
    const bool risen = update<Traits>(rS, state, correction, scale);
    exponentials<Traits>(rS, state, scale);
    pin(rS);
    if (!next.last()) pipe.wait_k();  // and no exponential sinks below the wait for O
    wgmma_wait<0>();                  // O is there, P and V are free
    pin(rO);
    pipe.release_v();
    if (kOpensTile) {
      finish(previous, finished);
    } else if (risen) {
      rescale<Traits>(rO, correction);
    }
    pack<Traits>(rP, rS);
  }

  __device__ __forceinline__ void run() {
    clear(rO);
    pipe.first_turn();
    if (!next.open_tile(pipe)) return;
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
        step<false>(work);
        pipe.release_o();
      }
      pipe.release_o();  // O of the tile before has left; the coming Q may wait for its slot
      pipe.close_q();
      if (!next.open_tile(pipe)) break;
      step<true>(work);
    }
    gemm_pv<Traits>(rO, rP, pipe.wait_v());
    wgmma_wait<0>();
    pin(rO);
    pipe.release_v();
    finish(*next.work, state);
    pipe.release_o();  // shared memory stays until TMA has read it
  }
};

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
    Consumer<Traits>{args, shared, warpgroup - 1}.run();
  }
}

}  // namespace flash::v3
