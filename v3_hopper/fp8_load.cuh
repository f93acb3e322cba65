// Global -> shared by TMA, in FP8: one warp keeps the rings of Q, K and V as it comes full.
#pragma once

#include "v3_hopper/fp8_traits.cuh"
#include "v3_hopper/load.cuh"

namespace flash::v3::fp8 {

template <class Traits>
__device__ __forceinline__ void init_pipes(typename Traits::Shared& shared) {
  for (int i = 0; i < Traits::kWorkSlots; ++i) {
    shared.work_full[i].init(1);
    shared.work_empty[i].init(Traits::kWorkReaders);
  }
  for (int i = 0; i < Traits::kStagesQ; ++i) {
    for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
      shared.q_full[i][consumer].init(1);
      shared.q_empty[i][consumer].init(1);
    }
  }
  for (int i = 0; i < Traits::kStages; ++i) {
    shared.k_full[i].init(2);  // the copy and the scale
    shared.k_empty[i].init(Traits::kConsumers);
    shared.v_full[i].init(kGuardWarps);
    shared.v_empty[i].init(Traits::kConsumers);
  }
  for (int i = 0; i < Traits::kStagesRaw; ++i) {
    shared.raw_full[i].init(1);
    shared.raw_empty[i].init(kGuardWarps);
  }
  fence_barrier_init();
}

// What the loading warp carries through the whole kernel.
template <class Traits>
struct Loader {
  const Arguments& args;
  typename Traits::Shared& shared;
  Ring<Traits::kStagesQ> q;
  Ring<Traits::kStages> k;
  Ring<Traits::kStagesRaw> raw;

  __device__ __forceinline__ void load_q(const Work& at) {
#pragma unroll
    for (int group = 0; group < Traits::kConsumers; ++group) {
      shared.q_empty[q.slot][group].wait(q.parity ^ 1);
      if (threadIdx.x == 0) {
        Barrier& full = shared.q_full[q.slot][group];
        full.arrive_expect(Traits::kBytesQ);
        load_rows<kGroupRows, Traits::kChunks>(shared.q[q.slot][group], args.q,
                                               query_row(at, group), at.head, at.batch, full);
      }
    }
    q.advance();
  }

  __device__ __forceinline__ void load_k(const Work& at, int block) {
    const float descale =
        descale_of(args.p.k_descale, at.index, block * Traits::kBlockKV, at.head_kv);
    shared.k_empty[k.slot].wait(k.parity ^ 1);
    if (threadIdx.x == 0) {
      Barrier& full = shared.k_full[k.slot];
      full.arrive_expect(Traits::kBytesK);
      load_rows<Traits::kBlockKV, Traits::kChunks>(
          shared.k[k.slot], args.k, key_row<Traits>(at, block), at.head_kv, at.batch, full);
      shared.k_descale[k.slot] = descale;
      full.arrive();
    }
    k.advance();
  }

  __device__ __forceinline__ void load_v(const Work& at, int block) {
    shared.raw_empty[raw.slot].wait(raw.parity ^ 1);
    if (threadIdx.x == 0) {
      Barrier& full = shared.raw_full[raw.slot];
      full.arrive_expect(Traits::kBytesRaw);
      load_rows<Traits::kBlockKV, Traits::kChunksV>(
          shared.raw[raw.slot], args.v, key_row<Traits>(at, block), at.head_kv, at.batch, full);
    }
    raw.advance();
  }

 private:
  template <int kRows, int kChunkCount>
  __device__ __forceinline__ void load_rows(unsigned char* tile, const CUtensorMap& map, int row,
                                            int head, int batch, Barrier& full) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunkCount; ++chunk) {
      load_box(tile + chunk * kRows * kChunkBytes, map,
               {chunk * Traits::kChunkColumns, row, head, batch}, full);
    }
  }
};

// Loads everything in the order in which it is needed; V early, for it is transposed first.
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
    load.load_v(work, blocks.end - 1);
    for (int j = blocks.end - 2; j >= blocks.begin; --j) {
      load.load_k(work, j);
      load.load_v(work, j);
    }
    __syncwarp();
    if (threadIdx.x == 0) shared.work_empty[slot.slot].arrive();
  }
}

}  // namespace flash::v3::fp8
