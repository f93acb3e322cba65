// The algorithm in FP8: consumer warpgroups at different points of S, softmax and P V fill each
// other's gaps, while the producer's warps transpose V ahead of them, unless it comes so.
#pragma once

#include "v3_hopper/fp8_gemm.cuh"
#include "v3_hopper/fp8_guard.cuh"
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
  using Scores = float[Traits::kBlockKV / 2];  // (64, kBlockKV)
  float rO[Traits::kHeadDimV / 2];             // (64, dv), in units of the last block of V
  uint32_t rP[Traits::kBlockKV / 8];           // (64, kBlockKV), e4m3
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
    Scores rS;
    pipe.wait_k();
    if (Traits::kLean) last = block == shared.last_block[consumer];
    const float factor = (Traits::kLean ? pipe.to_log2() : to_log2) * pipe.scales().k;
    const float v_ratio = pipe.scales().v_ratio;
    begin_scores(rS);
    soften(rS, work, block, boundary, last, factor, v_ratio);
    return last;
  }

  __device__ __forceinline__ void begin_scores(Scores& rS) {
    gemm_qk<Traits>(rS, pipe.tile_q(), pipe.tile_k());
    pipe.give_turn();
  }

  __device__ __forceinline__ void soften(Scores& rS, const Work& work, int block, bool boundary,
                                         bool last, float factor, float v_ratio) {
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
      const int key = block * Traits::kBlockKV;
      hide<Traits>(rS, work.sequence, work.row + thread_row(), key);
    }
    update<Traits>(rS, state, rO, factor);
    change_units(state, v_ratio);
    exponentials<Traits>(rP, rS, state, factor);
    pipe.wait_v();
    pin(rP);
    pipe.take_turn();
  }

  // O and the row sums of one block; in parts, with as many in flight as there are registers for.
  // V's slot is kept where O is to pass through it. Returns whether the next K was seen to be
  // there.
  __device__ __forceinline__ bool accumulate(bool keeps_v = false) {
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
    const bool has_k = Traits::kStagesO && pipe.has_next_k();
    wgmma_wait<0>();
    pin(last);
    pipe.release_v(Traits::kStagesO && keeps_v);
    promote<kLast, kPart>(rO, last, state.correction);
    add_sums(state, last[kPart / 2], last[kPart / 2 + 2]);
    return has_k;
  }

  // The blocks of a tile that this warpgroup's rows see, and how many others above and below are
  // only for other rows.
  struct Span {
    int first, end, above, below;
    // O leaves through the slot of V that was the last to be used by this warpgroup and by those
    // that come after it.
    __device__ __forceinline__ bool stages_o(int consumer) const {
      if (Traits::kKeysContiguous) return true;
      return below == 0 && end - first >= Traits::kConsumers - consumer;
    }
  };
  __device__ __forceinline__ Span span(const Work& work) const {
    const Range blocks = key_blocks<Traits>(work);
    const Range keys = work.sequence.keys(work.row + group_row(), kGroupRows);
    const int first = max(keys.begin / Traits::kBlockKV, blocks.begin);
    const int end = max(ceil_div(keys.end, Traits::kBlockKV), first);
    return {first, end, blocks.end - end, first - blocks.begin};
  }

  // Returns whether O is still on its way through shared memory.
  __device__ __forceinline__ bool finish(const Work& work) {
    if (!Traits::kTakesTurns) pipe.sync();  // no turn has ordered the units, which one thread keeps
    float lse[2];
    normalize<Traits>(rO, state, lse, pipe.units());
    const bool staged = Traits::kStagesO && span(work).stages_o(consumer);
    store_state<Traits>(args, work, consumer, thread_row(), staged ? pipe.tile_o() : nullptr, rO,
                        lse);
    if (work.poisoned) {
      pipe.sync();  // all rows are written
      const View& v = args.p.v;
      restore_poison<Traits>(args.p, work, work.row + group_row(), v.row,
                             Traits::kKeysContiguous ? v.head / Traits::kHeadDimV : 1);
    }
    pipe.release_work();
    return staged;
  }

  // A new tile: nothing has been seen.
  __device__ __forceinline__ void reset() {
    clear(rO);
    state = {{-INFINITY, -INFINITY}, {}, {}};
    to_log2 = pipe.to_log2();
  }

  // The tile before is finished; where O passes through a slot of V, that is given back.
  __device__ __forceinline__ void finish_before(const Work& done) {
    if (finish(done)) pipe.release_o();
  }

  // One tile. O of the tile before leaves under the first S.
  __device__ __forceinline__ void run_tile(const Work& work, const Work* done) {
    const Span at = span(work);
    const Range unmasked = unmasked_blocks<Traits>(work.sequence, work.row + group_row());
    if (done != nullptr && (at.above > 0 || at.first == at.end)) {
      finish_before(*done);  // what is skipped needs the slot that O may hold
      done = nullptr;
    }
    pipe.wait_q();
    for (int i = at.above; i > 0; --i) skip();
    if (at.first == at.end) {
      reset();
      pipe.release_q();
    }
    bool has_k = false;
    for (int block = at.end - 1; block >= at.first; --block) {
      Scores rS;
      if (!has_k) pipe.wait_k();
      begin_scores(rS);
      if (block == at.end - 1) {
        const bool staged = done != nullptr && finish(*done);
        reset();
        if (staged) pipe.release_o();
      }
      soften(rS, work, block, !unmasked.holds(block), block == at.first, to_log2 * pipe.scales().k,
             pipe.scales().v_ratio);
      const bool keeps_v = block == at.first + Traits::kConsumers - 1 - consumer;
      has_k = accumulate(!Traits::kKeysContiguous && keeps_v && span(work).below == 0);
    }
    for (int i = span(work).below; i > 0; --i) skip();
  }

  // As run, for O that is staged: a tile's first S begins before O of the tile before leaves.
  __device__ __forceinline__ void run_staged() {
    pipe.first_turn();
    const Work* done = nullptr;  // its O has not left yet
    const Work* work = &pipe.wait_work();
    if (work->head < 0) return;
    pipe.take_turn();
    while (work->head >= 0) {
      run_tile(*work, done);
      done = work;
      work = &pipe.next_work();
    }
    pipe.give_turn();
    finish_before(*done);
    if (threadIdx.x % kGroupThreads == 0) wait_stores_read<0>();  // their memory is still ours
  }

  __device__ __forceinline__ void run_plain() {
    pipe.first_turn();
    for (;;) {
      const Work& work = pipe.wait_work();
      if (work.head < 0) return;
      const int row = work.row + group_row();
      const Range blocks = key_blocks<Traits>(work), keys = work.sequence.keys(row, kGroupRows);
      const int above = max(keys.begin / Traits::kBlockKV, blocks.begin);
      const int first = Traits::kLean ? min(above, blocks.end) : above;
      const int end = max(ceil_div(keys.end, Traits::kBlockKV), first);
      const Range unmasked = unmasked_blocks<Traits>(work.sequence, row);
      clear(rO);
      state = {{-INFINITY, -INFINITY}, {}, {}};
      pipe.wait_q();
      if (!Traits::kLean) {
        to_log2 = pipe.to_log2();
      } else if (threadIdx.x % kGroupThreads == 0) {
        shared.last_block[consumer] = first;
      }
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

  __device__ __forceinline__ void run() {
    if constexpr (Traits::kStagesO) {
      run_staged();
    } else {
      run_plain();
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
      if constexpr (Traits::kKeysContiguous) {
        clean_all<Traits>(shared);
      } else {
        transpose_all<Traits>(shared);
      }
    }
  } else {
    grow_registers<Traits::kConsumerRegisters>();
    Consumer<Traits>{args, shared, warpgroup - 1}.run();
  }
}

}  // namespace flash::v3::fp8
