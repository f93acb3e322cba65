// Global -> shared by TMA: one warp keeps the rings of Q, K and V full; guards look through V.
#pragma once

#include "v3_hopper/schedule.cuh"

namespace flash::v3 {

// What the producer warp carries through the whole kernel.
template <class Traits>
struct Loader {
  using Shared = typename Traits::Shared;
  const Arguments& args;
  Shared& shared;
  Ring<Traits::kStagesQ> q;
  Ring<Traits::kStages> k, v;

  __device__ __forceinline__ void load_q(const Work& at) {
#pragma unroll
    for (int group = 0; group < Traits::kConsumers; ++group) {
      shared.q_empty[q.slot][group].wait(q.parity ^ 1);
      if (threadIdx.x == 0) {
        Barrier& full = shared.q_full[q.slot][group];
        full.arrive_expect(Traits::kBytesQ);
        const int row = int(at.sequence.row_q) + at.row + group * kGroupRows;
        load_rows<kGroupRows, Traits::kChunks>(shared.q[q.slot][group], args.q, row, at.head,
                                               at.batch, full);
      }
    }
    q.advance();
  }

  __device__ __forceinline__ void load_k(const Work& at, int block) {
    shared.k_empty[k.slot].wait(k.parity ^ 1);
    if (threadIdx.x == 0) {
      Barrier& full = shared.k_full[k.slot];
      full.arrive_expect(Traits::kBytesK);
      load_rows<Traits::kBlockKV, Traits::kChunks>(shared.k[k.slot], args.k, key_row(at, block),
                                                   head_kv(at), at.batch, full);
    }
    k.advance();
  }

  // V counts as full after one arrival for the copy and one of each guard; without need of a guard
  // the producer arrives for them.
  __device__ __forceinline__ void load_v(const Work& at, int block) {
    shared.v_empty[v.slot].wait(v.parity ^ 1);
    if (threadIdx.x == 0) {
      const bool guarded = needs_guard<Traits>(at, block, args.p.cu_seqlens_k != nullptr);
      Barrier& full = guarded ? shared.v_landed[v.slot] : shared.v_full[v.slot];
      full.arrive_expect(Traits::kBytesV);
      shared.v_full[v.slot].arrive(guarded ? 1 : kGuardWarps);
      load_rows<Traits::kBlockKV, Traits::kChunksV>(shared.v[v.slot], args.v, key_row(at, block),
                                                    head_kv(at), at.batch, full);
    }
    v.advance();
  }

 private:
  __device__ __forceinline__ int key_row(const Work& at, int block) const {
    return int(at.sequence.row_k) + block * Traits::kBlockKV;
  }
  __device__ __forceinline__ int head_kv(const Work& at) const {
    return at.head / (args.p.heads_q / args.p.heads_kv);
  }
  template <int kRows, int kChunkCount>
  __device__ __forceinline__ void load_rows(unsigned char* tile, const CUtensorMap& map, int row,
                                            int head, int batch, Barrier& full) const {
    batch = args.p.cu_seqlens_q ? 0 : batch;  // packed tensors have no batch dimension
#pragma unroll
    for (int chunk = 0; chunk < kChunkCount; ++chunk) {
      load_box(tile + chunk * kRows * kChunkBytes, map,
               {chunk * Traits::kChunkColumns, row, head, batch}, full);
    }
  }
};

}  // namespace flash::v3
