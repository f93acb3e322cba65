// The algorithm in FP8: consumer warpgroups at different points of S, softmax and P V fill each
// other's gaps, while the producer's warps transpose V ahead of them.
#pragma once

#include "v3_hopper/fp8_gemm.cuh"
#include "v3_hopper/fp8_load.cuh"
#include "v3_hopper/fp8_pipe.cuh"
#include "v3_hopper/fp8_softmax.cuh"
#include "v3_hopper/fp8_transpose.cuh"
#include "v3_hopper/guard.cuh"
#include "v3_hopper/store.cuh"

namespace flash::v3::fp8 {

// One consumer warpgroup: 64 rows of every tile.
template <class Traits>
struct Consumer {
  const Arguments& args;
  typename Traits::Shared& shared;
  const int consumer;
  Pipes<Traits> pipe = {shared, consumer};
  float rO[Traits::kHeadDimV / 2];    // (64, dv), in units of the last block of V
  uint32_t rP[Traits::kBlockKV / 8];  // (64, kBlockKV), e4m3
  RowState state;
  float correction[2];
  float to_log2;  // of Q K^T as stored, without the scale of K

  // First row of this warpgroup and of this thread inside a tile.
  __device__ __forceinline__ int group_row() const { return consumer * kGroupRows; }
  __device__ __forceinline__ int thread_row() const {
    return group_row() + threadIdx.x % kGroupThreads / kWarp * 16 + threadIdx.x % kWarp / 4;
  }

  // A block that only other consumers' rows see.
  __device__ __forceinline__ void skip() {
    pipe.wait_k();
    pipe.release_k();
    pipe.wait_v();
    pipe.release_v();
  }

  // P of one block.
  __device__ __forceinline__ void scores(const Work& work, int key, bool boundary) {
    float rS[Traits::kBlockKV / 2];  // (64, kBlockKV)
    pipe.wait_k();
    float factor = to_log2 * shared.k_descale[pipe.slot()];
    gemm_qk<Traits>(rS, pipe.tile_q(), shared.k[pipe.slot()]);
    wgmma_wait<0>();
    pin(rS);
    pipe.release_k();
    if constexpr (Traits::kFeatured) {
      feature<Traits>(rS, args.p.softcap, factor);
      factor = 1.0f;
    }
    if (boundary) mask<Traits>(rS, work.sequence, work.row + thread_row(), key);
    update<Traits>(rS, state, correction, factor);
    exponentials<Traits>(rP, rS, state, factor);
  }

  // O and the row sums of one block; in parts, with as many in flight as there are registers for.
  __device__ __forceinline__ void accumulate() {
    constexpr int kPart = Traits::kPartV, kLast = (Traits::kPartsV - 1) * kPart;
    constexpr int kWide = kPart + Traits::kSumColumns;
    pipe.wait_v();
    const unsigned char* sV = shared.v[pipe.slot()];
    change_units(state, correction, shared.v_descale[pipe.slot()]);
    if constexpr (Traits::kPartsV == 4) {
      float even[kPart / 2], odd[kPart / 2];
      gemm_pv<Traits, 0, kPart>(even, rP, sV);
      gemm_pv<Traits, kPart, kPart>(odd, rP, sV);
      wgmma_wait<1>();
      pin(even);
      promote<0, kPart>(rO, even, correction);
      gemm_pv<Traits, 2 * kPart, kPart>(even, rP, sV);
      wgmma_wait<1>();
      pin(odd);
      promote<kPart, kPart>(rO, odd, correction);
      wgmma_wait<0>();
      pin(even);
      promote<2 * kPart, kPart>(rO, even, correction);
    }
    [[maybe_unused]] float half[kPart / 2];
    if constexpr (Traits::kPartsV == 2) gemm_pv<Traits, 0, kPart>(half, rP, sV);
    float last[kWide / 2];
    gemm_pv<Traits, kLast, kWide>(last, rP, sV);
    if constexpr (Traits::kPartsV == 2) {
      wgmma_wait<1>();
      pin(half);
      promote<0, kPart>(rO, half, correction);
    }
    wgmma_wait<0>();
    pin(last);
    pipe.release_v();
    promote<kLast, kPart>(rO, last, correction);
    state.row_sum[0] += last[kPart / 2];  // the column behind V: the first thread's of a quad
    state.row_sum[1] += last[kPart / 2 + 2];
  }

  __device__ __forceinline__ void finish(const Work& work) {
    float lse[2];
    normalize<Traits>(rO, state, lse);
    store_state<Traits>(args, work, consumer, thread_row(), nullptr, rO, lse);
    if (work.poisoned) {
      pipe.sync();  // all rows are written
      restore_poison<Traits>(args.p, work, work.row + group_row());
    }
    pipe.release_work();
  }

  __device__ __forceinline__ void run() {
    for (;;) {
      const Work& work = pipe.wait_work();
      if (work.head < 0) return;
      const int row = work.row + group_row();
      const float q_descale = descale_of(args.p.q_descale, work.index, row, work.head_kv);
      to_log2 = args.p.scale * kLog2E * q_descale;
      const Range blocks = key_blocks<Traits>(work), keys = work.sequence.keys(row, kGroupRows);
      const int first = max(keys.begin / Traits::kBlockKV, blocks.begin);
      const int end = max(ceil_div(keys.end, Traits::kBlockKV), first);
      const Range unmasked = unmasked_blocks<Traits>(work.sequence, row);
      clear(rO);
      state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}, 1.0f};
      pipe.wait_q();
      for (int block = blocks.end - end; block > 0; --block) skip();
      for (int block = end - 1; block >= first; --block) {
        scores(work, block * Traits::kBlockKV, !unmasked.holds(block));
        accumulate();
      }
      pipe.release_q();
      for (int block = first - blocks.begin; block > 0; --block) skip();
      finish(work);
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
  const int warpgroup = __shfl_sync(~0u, int(threadIdx.x) / kGroupThreads, 0);
  if (threadIdx.x == 0) init_pipes<Traits>(shared);
  write_ones<Traits>(shared);
  __syncthreads();
  if (warpgroup == 0) {
    shrink_registers<Traits::kProducerRegisters>();
    const int role = threadIdx.x / kWarp;
    if (role == kLoads) {
      fp8::produce<Traits>(args, shared);
    } else if (role == kSchedules) {
      announce<Traits>(args, shared);
    } else {
      transpose_all<Traits>(args, shared);
    }
  } else {
    grow_registers<Traits::kConsumerRegisters>();
    Consumer<Traits>{args, shared, warpgroup - 1}.run();
  }
}

}  // namespace flash::v3::fp8
