// One consumer warpgroup: what it keeps in registers, and what it does with that beside GEMMs.
#pragma once

#include "v3_hopper/gemm.cuh"
#include "v3_hopper/guard.cuh"
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
  Pipes<Traits> pipe = {shared, consumer};
  Stream<Traits> next{consumer};      // the block whose scores come next
  float rO[Traits::kHeadDimV / 2];    // (64, dv)
  float rS[Traits::kBlockKV / 2];     // (64, kBlockKV): S, then P
  uint32_t rP[Traits::kBlockKV / 4];  // (64, kBlockKV): P, 16-bit
  Softmax<Traits> softmax = {make_scale<Traits>(args.p)};

  __device__ __forceinline__ void mask_boundary() {
    feature<Traits>(rS, softmax.scale);
    if (next.boundary()) mask<Traits>(rS, next.work->sequence, next.row(), next.key());
  }

  template <bool kOpensTile>
  __device__ __forceinline__ bool soften(const unsigned char* sK) {
    return softmax.template block<kOpensTile>(rS, pipe.tile_q(), sK, [&] { mask_boundary(); });
  }

  __device__ __forceinline__ void finish(const Work& work, RowState rows) {
    float lse[2];
    normalize<Traits>(rO, rows, lse, softmax.scale);
    store_state<Traits>(args, work, consumer, next.thread_row(), pipe.tile_o(), rO, lse);
    if (work.poisoned) {
      pipe.sync();  // all rows are written
      restore_poison<Traits>(args.p, work, work.row + next.group_row, args.p.v.row);
    }
    pipe.release_work(work);
    clear(rO);
  }

  // Where Q has one buffer: the last P V of a tile, under which the next Q comes, then the next S,
  // under which O leaves. False at the end of the stream.
  __device__ __forceinline__ bool change_tile(const Work& previous) {
    pipe.take_turn();
    gemm_pv<Traits>(rO, rP, pipe.wait_v());
    pipe.give_turn();
    wgmma_wait<0>();
    pin(rO);
    pipe.release_v();
    const bool more = next.open_tile(pipe);
    if (!more) {
      finish(previous, softmax.state);
      return false;
    }
    const auto* sK = pipe.wait_k();
    pipe.take_turn();
    gemm_qk<Traits>(rS, pipe.tile_q(), sK);
    pipe.give_turn();
    finish(previous, softmax.state);
    wgmma_wait<0>();
    pin(rS);
    soften<true>(sK);
    pipe.release_k();
    if (next.last()) pipe.release_q();
    pack<Traits>(rP, rS);
    next.skip_v(pipe);
    return true;
  }

  // In forward.cuh: one block, and the whole stream.
  template <bool kOpensTile>
  __device__ __forceinline__ void step(const Work& previous);
  __device__ __forceinline__ void run();
};

}  // namespace flash::v3
