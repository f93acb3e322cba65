// The algorithm: a producer warp streams K and V past consumer warpgroups that take turns at the
// tensor cores, and each hides its softmax under its own O += P V and the others' GEMMs.
#pragma once

#include "v3_hopper/consumer.cuh"
#include "v3_hopper/gemm.cuh"
#include "v3_hopper/load.cuh"

namespace flash::v3 {

// S of block `next`, O += P V of the one before, softmax of the one under the other.
template <class Traits>
template <bool kOpensTile>
__device__ __forceinline__ void Consumer<Traits>::step(const Work& previous) {
  const auto* sK = pipe.wait_k();
  pipe.take_turn();
  gemm_qk<Traits>(rS, pipe.tile_q(), sK);
  gemm_pv<Traits>(rO, rP, pipe.wait_v());
  pipe.give_turn();
  wgmma_wait<1>();  // S is there
  pin(rS);
  const RowState finished = softmax.state;
  const bool risen = soften<kOpensTile>(sK);
  pin(rS);
  pipe.release_k();
  if (next.last()) pipe.release_q();
  if (!next.last()) pipe.wait_k();  // and no exponential sinks below the wait for O
  wgmma_wait<0>();                  // O is there, P and V are free
  pin(rO);
  pipe.release_v();
  if (kOpensTile) {
    finish(previous, finished);
  } else if (risen) {
    rescale<Traits>(rO, softmax.correction);
  }
  pack<Traits>(rP, rS);
  if (kOpensTile) next.skip_v(pipe);
}

// The blocks of all tiles as one stream.
template <class Traits>
__device__ __forceinline__ void Consumer<Traits>::run() {
  clear(rO);
  pipe.first_turn();
  if (!next.open_tile(pipe)) return;
  const auto* sK = pipe.wait_k();
  gemm_qk<Traits>(rS, pipe.tile_q(), sK);
  wgmma_wait<0>();
  pin(rS);
  soften<true>(sK);
  pipe.release_k();
  if (next.last()) pipe.release_q();
  pack<Traits>(rP, rS);
  next.skip_v(pipe);
  for (;;) {
    const Work& work = *next.work;
    while (!next.last()) {
      next.advance();
      step<false>(work);
    }
    pipe.q.advance();
    if constexpr (Traits::kStagesQ == 1) {
      if (!change_tile(work)) return wait_stores_read<0>();
    } else {
      if (!next.open_tile(pipe)) break;
      step<true>(work);
    }
  }
  gemm_pv<Traits>(rO, rP, pipe.wait_v());
  wgmma_wait<0>();
  pin(rO);
  pipe.release_v();
  finish(*next.work, softmax.state);
  wait_stores_read<0>();  // shared memory stays until then
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
    Consumer<Traits>{args, shared, warpgroup - 1}.run();
  }
}

}  // namespace flash::v3
