// The algorithm: a producer warp streams K and V past consumer warpgroups that take turns at the
// tensor cores, and each hides its softmax under its own O += P V and the others' GEMMs.
#pragma once

#include "v3_hopper/gemm.cuh"
#include "v3_hopper/guard.cuh"
#include "v3_hopper/load.cuh"
#include "v3_hopper/pipe.cuh"
#include "v3_hopper/softmax.cuh"
#include "v3_hopper/store.cuh"

namespace flash::v3 {

// The producer warp: everything is loaded in the order in which consumers need it.
template <class Traits>
__device__ __forceinline__ void produce(const Arguments& args, typename Traits::Shared& shared) {
  Schedule<Traits> schedule(args);
  Loader<Traits> load{args, shared};
  load.publish(schedule.next());
  for (;;) {
    const Work& work = load.published();
    if (work.head < 0) return;
    load.publish(schedule.next());  // one tile ahead: consumers never wait for the schedule
    const Range blocks = key_blocks<Traits>(work);
    if (blocks.begin == blocks.end) continue;
    load.load_k(work, blocks.end - 1);
    load.load_q(work);
    for (int j = blocks.end - 2; j >= blocks.begin; --j) {
      load.load_k(work, j);
      load.load_v(work, j + 1);
    }
    load.load_v(work, blocks.begin);
  }
}

// One consumer warpgroup: 64 rows of every tile.
template <class Traits>
__device__ __forceinline__ void consume(const Arguments& args, typename Traits::Shared& shared,
                                        int consumer) {
  const Scale scale = make_scale<Traits>(args.p);
  Pipes<Traits> pipe{shared, consumer};
  pipe.first_turn();
  for (;; pipe.next_work()) {
    const Work& work = pipe.wait_work();
    if (work.head < 0) return;
    const Range blocks = key_blocks<Traits>(work);
    const int group_row = work.row + consumer * kGroupRows;
    const Range unmasked = unmasked_blocks<Traits>(work.sequence, group_row);
    const int row = group_row + threadIdx.x % kGroupThreads / kWarp * 16 + threadIdx.x % kWarp / 4;

    float rO[Traits::kHeadDimV / 2];    // (64, dv)
    float rS[Traits::kBlockKV / 2];     // (64, kBlockKV): S, then P
    uint32_t rP[Traits::kBlockKV / 4];  // (64, kBlockKV): P, 16-bit
    RowState state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    float correction[2], lse[2];
    clear(rO);

    auto mask_boundary = [&](int j) {
      feature<Traits>(rS, scale);
      if (j < unmasked.begin || j >= unmasked.end) {
        mask<Traits>(rS, work.sequence, row, j * Traits::kBlockKV);
      }
    };

    if (blocks.begin < blocks.end) {
      const auto* sQ = pipe.wait_q();
      gemm_qk<Traits>(rS, sQ, pipe.wait_k());
      wgmma_wait<0>();
      pin(rS);
      pipe.release_k();
      mask_boundary(blocks.end - 1);
      update<Traits, true>(rS, state, correction, scale);
      pack<Traits>(rP, rS);
      const auto* sV = pipe.wait_v();
      for (int j = blocks.end - 2; j >= blocks.begin; --j) {
        const auto* sK = pipe.wait_k();
        pipe.take_turn();
        gemm_qk<Traits>(rS, sQ, sK);  // S(j) and O += P(j+1) V(j+1) run ...
        gemm_pv<Traits>(rO, rP, sV);
        pipe.give_turn();
        wgmma_wait<1>();  // S(j) is there
        pin(rS);
        pipe.release_k();
        mask_boundary(j);
        const bool risen = update<Traits, false>(rS, state, correction, scale);  // ... under this
        pin(rS);
        sV = pipe.wait_v();
        wgmma_wait<0>();  // O is there, P and V(j+1) are free
        pin(rO);
        pipe.release_v();
        pack<Traits>(rP, rS);
        if (risen) rescale<Traits>(rO, correction);
      }
      pipe.release_q();
      gemm_pv<Traits>(rO, rP, sV);
      wgmma_wait<0>();
      pin(rO);
      pipe.release_v();
    }
    normalize<Traits>(rO, state, lse, scale);
    if (work.poisoned) restore_poison<Traits>(args.p, work, row, rO);
    store_state<Traits>(args.p, work, row, rO, lse);
  }
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
    if (threadIdx.x < kWarp) {
      produce<Traits>(args, shared);
    } else {
      guard<Traits>(args, shared);
    }
  } else {
    grow_registers<Traits::kConsumerRegisters>();
    consume<Traits>(args, shared, warpgroup - 1);
  }
}

}  // namespace flash::v3
