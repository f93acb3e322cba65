// One consumer warpgroup: what it keeps in registers, and what it does with that beside GEMMs.
#pragma once

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
      restore_poison<Traits>(args.p, work, work.row + next.group_row);
    }
    pipe.release_work(work);
    clear(rO);
  }

  // In forward.cuh: one block, and the whole stream.
  template <bool kOpensTile>
  __device__ __forceinline__ void step(const Work& previous);
  __device__ __forceinline__ void run();
};

}  // namespace flash::v3
