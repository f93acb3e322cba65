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
  RowState<Traits::kLean> state;
  float to_log2;  // of Q K^T as stored, without the scale of K

  // First row of this warpgroup and of this thread inside a tile.
  __device__ __forceinline__ int group_row() const { return consumer * kGroupRows; }
  __device__ __forceinline__ int thread_row() const {
    return group_row() + threadIdx.x % kGroupThreads / kWarp * 16 + threadIdx.x % kWarp / 4;
  }

  // A block that only other consumers' rows see.
  __device__ __forceinline__ void skip() {
    pipe.give_turn();
    pipe.wait_k();
    pipe.sync();  // a warp that came later would wait for a phase that is over
    pipe.release_k();
    pipe.wait_v();
    pipe.sync();
    pipe.release_v();
    pipe.take_turn();
  }

  // P of one block. The tensor cores are this warpgroup's from its P V to its next S; its softmax
  // runs under the others' turns.
  __device__ __forceinline__ bool scores(const Work& work, int block, bool boundary, bool last) {
    float rS[Traits::kBlockKV / 2];  // (64, kBlockKV)
    pipe.wait_k();
    const Course& course = shared.course[consumer];
    if (Traits::kLean) last = block == course.last;
    float factor = (Traits::kLean ? course.to_log2 : to_log2) * pipe.scales().k;
    const float v_ratio = pipe.scales().v_ratio;
    gemm_qk<Traits>(rS, pipe.tile_q(), pipe.tile_k());
    pipe.give_turn();
    wgmma_wait<0>();
    pin(rS);
    if (last) pipe.keep_units();
    pipe.release_k();
    if (last) pipe.release_q();
    if constexpr (Traits::kFeatured) {
      feature<Traits>(rS, args.p.softcap, factor);
      factor = 1.0f;
    }
    if (boundary) {
      mask<Traits>(rS, work.sequence, work.row + thread_row(), block * Traits::kBlockKV);
    }
    update<Traits>(rS, state, rO, factor);
    change_units(state, v_ratio);
    exponentials<Traits>(rP, rS, state, factor);
    pipe.wait_v();
    pin(rP);
    pipe.take_turn();
    return last;
  }

  // O and the row sums of one block; in parts, with as many in flight as there are registers for.
  __device__ __forceinline__ void accumulate() {
    constexpr int kPart = Traits::kPartV, kLast = (Traits::kPartsV - 1) * kPart;
    constexpr int kWide = kPart + Traits::kSumColumns;
    const unsigned char* sV = pipe.tile_v();
    [[maybe_unused]] float before[kPart / 2];  // the part before the last
    if constexpr (Traits::kPartsV == 4) {
      float odd[kPart / 2];
      gemm_pv<Traits, 0, kPart>(before, rP, sV);
      gemm_pv<Traits, kPart, kPart>(odd, rP, sV);
      wgmma_wait<1>();
      pin(before);
      promote<0, kPart>(rO, before, state.correction);
      gemm_pv<Traits, 2 * kPart, kPart>(before, rP, sV);
      wgmma_wait<1>();
      pin(odd);
      promote<kPart, kPart>(rO, odd, state.correction);
    } else if constexpr (Traits::kPartsV == 2) {
      gemm_pv<Traits, 0, kPart>(before, rP, sV);
    }
    float last[kWide / 2];
    gemm_pv<Traits, kLast, kWide>(last, rP, sV);
    if constexpr (Traits::kPartsV > 1) {
      wgmma_wait<1>();
      pin(before);
      promote<kLast - kPart, kPart>(rO, before, state.correction);
    }
    wgmma_wait<0>();
    pin(last);
    pipe.release_v();
    promote<kLast, kPart>(rO, last, state.correction);
    add_sums(state, last[kPart / 2], last[kPart / 2 + 2]);
  }

  __device__ __forceinline__ void finish(const Work& work) {
    float lse[2];
    normalize<Traits>(rO, state, lse, pipe.units());
    store_state<Traits>(args, work, consumer, thread_row(), nullptr, rO, lse);
    if (work.poisoned) {
      pipe.sync();  // all rows are written
      restore_poison<Traits>(args.p, work, work.row + group_row());
    }
    pipe.release_work();
  }

  __device__ __forceinline__ void run() {
    pipe.first_turn();
    for (;;) {
      const Work& work = pipe.wait_work();
      if (work.head < 0) return;
      const int row = work.row + group_row();
      const int scaled_row = min(row, work.sequence.seqlen_q - 1);  // a group may have no rows
      const float q_descale = descale_of(args.p.q_descale, work.index, scaled_row, work.head_kv);
      to_log2 = args.p.scale * kLog2E * q_descale;
      const Range blocks = key_blocks<Traits>(work), keys = work.sequence.keys(row, kGroupRows);
      const int above = max(keys.begin / Traits::kBlockKV, blocks.begin);
      const int first = Traits::kLean ? min(above, blocks.end) : above;
      const int end = max(ceil_div(keys.end, Traits::kBlockKV), first);
      const Range unmasked = unmasked_blocks<Traits>(work.sequence, row);
      if (Traits::kLean && threadIdx.x % kGroupThreads == 0) {
        shared.course[consumer] = {first, to_log2};
      }
      clear(rO);
      state = {{-INFINITY, -INFINITY}, {}, {}};
      pipe.wait_q();
      pipe.take_turn();
      for (int block = blocks.end - end; block > 0; --block) skip();
      if constexpr (Traits::kLean) {
        if (first == end) pipe.release_q();
        int block = end;
        for (bool last = first == end; !last;) {
          --block;
          last = scores(work, block, !unmasked.holds(block), block == first);
          accumulate();
        }
      } else {
        for (int block = end - 1; block >= first; --block) {
          scores(work, block, !unmasked.holds(block), block == first);
          accumulate();
        }
        if (first == end) pipe.release_q();
      }
      for (int block = first - blocks.begin; block > 0; --block) skip();
      pipe.give_turn();
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
    if (threadIdx.x < kWarp) {
      fp8::produce<Traits>(args, shared);
    } else {
      transpose_all<Traits>(shared);
    }
  } else {
    grow_registers<Traits::kConsumerRegisters>();
    Consumer<Traits>{args, shared, warpgroup - 1}.run();
  }
}

}  // namespace flash::v3::fp8
