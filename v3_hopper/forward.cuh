// The algorithm: a producer warp streams K and V past consumer warpgroups that take turns at the
// tensor cores, and each hides its softmax under its own O += P V and the others' GEMMs.
#pragma once

#include "v3_hopper/gemm.cuh"
#include "v3_hopper/guard.cuh"
#include "v3_hopper/load.cuh"
#include "v3_hopper/settle.cuh"
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
  bool unseen = true;  // some row of this warp has no reference yet

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
    pipe.release_work(work);
    clear(rO);
  }

  // Softmax of the block in rS; true where O must be rescaled. The highest score is sought only
  // while a row lacks a reference, as in a tile's first block.
  template <bool kOpensTile>
  __device__ __forceinline__ bool softmax(const unsigned char* sQ, const unsigned char* sK) {
    bool risen = false;
    mask_boundary();
    if (kOpensTile) state = kNoRows;
    if (Traits::kFeatured || kOpensTile || unseen) {
      risen = update<Traits>(rS, state, correction, scale);
      unseen = __any_sync(~0u, state.row_max[0] == -INFINITY || state.row_max[1] == -INFINITY);
    }
    BlockSum sum = exponentials(rS, state, scale);
    if constexpr (!Traits::kFeatured && !kOpensTile) {
      if (__any_sync(~0u, sum.row(0) > kLargeSum || sum.row(1) > kLargeSum)) {
        float more[2];
        settle<Traits>(rS, sum, state, more, scale, sQ, sK, [&] { mask_boundary(); });
        correction[0] = risen ? correction[0] * more[0] : more[0];
        correction[1] = risen ? correction[1] * more[1] : more[1];
        risen = true;
      }
    }
    state.row_sum[0] += sum.row(0);
    state.row_sum[1] += sum.row(1);
    return risen;
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
    const RowState finished = state;
    const bool risen = softmax<kOpensTile>(pipe.tile_q(), sK);
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
      rescale<Traits>(rO, correction);
    }
    pack<Traits>(rP, rS);
  }

  // A tile's first scores, with nothing to run beside them; false at the end of the stream.
  __device__ __forceinline__ bool open() {
    if (!next.open_tile(pipe)) return false;
    const auto* sK = pipe.wait_k();
    gemm_qk<Traits>(rS, pipe.tile_q(), sK);
    wgmma_wait<0>();
    pin(rS);
    softmax<true>(pipe.tile_q(), sK);
    pipe.release_k();
    if (next.last()) pipe.release_q();
    pack<Traits>(rP, rS);
    return true;
  }

  // A tile's last O += P V, likewise.
  __device__ __forceinline__ void close() {
    gemm_pv<Traits>(rO, rP, pipe.wait_v());
    wgmma_wait<0>();
    pin(rO);
    pipe.release_v();
    finish(*next.work, state);
  }

  __device__ __forceinline__ void run() {
    clear(rO);
    pipe.first_turn();
    if (!open()) return;
    for (;;) {
      const Work& work = *next.work;
      while (!next.last()) {
        next.advance();
        step<false>(work);
      }
      pipe.q.advance();
      if (!next.open_tile(pipe)) break;
      step<true>(work);
    }
    close();
    wait_stores_read<0>();  // shared memory stays until then
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
