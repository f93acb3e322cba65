// O and LSE -> global. Each consumer stages its rows in shared memory of its own and hands them to
// TMA; no warpgroup waits for another.
#pragma once

#include "v3_hopper/softmax.cuh"
#include "v3_hopper/tma.cuh"

namespace flash::v3 {

// Quad transposition: thread c gives word k to thread k and receives word c of every thread.
__device__ __forceinline__ void exchange(uint32_t (&word)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t received = __shfl_xor_sync(~0u, odd ? word[i] : word[i + 1], 1);
    word[i] = odd ? received : word[i];
    word[i + 1] = odd ? word[i + 1] : received;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t received = __shfl_xor_sync(~0u, high ? word[i] : word[i + 2], 2);
    word[i] = high ? received : word[i];
    word[i + 2] = high ? word[i + 2] : received;
  }
}

// Rows that end inside a tile, and kernels without room to stage O: every row is checked. `row` is
// the first of this thread's two rows, in the sequence.
template <class Traits>
__device__ __forceinline__ void store_rows(const ForwardParams& p, const Work& work, int row,
                                           const float (&o)[Traits::kHeadDimV / 2]) {
  const int quad_lane = threadIdx.x % 4;
  auto* gO = static_cast<typename Traits::Output*>(p.o.data) + work.batch * p.o.batch +
             (work.sequence.row_q + row) * p.o.row + work.head * p.o.head;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int group = 0; group < Traits::kHeadDimV / 32; ++group) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 16 * group + 4 * i + 2 * half;
        word[i] = pack_pair<typename Traits::Output>(o[at], o[at + 1]);
      }
      exchange(word);
      const int column = 32 * group + 8 * quad_lane;
      if (row + 8 * half < work.sequence.seqlen_q && column < p.head_dim_v) {
        *reinterpret_cast<uint4*>(gO + half * 8 * p.o.row + column) = {word[0], word[1], word[2],
                                                                       word[3]};
      }
    }
  }
}

// Chunk after chunk of one consumer's rows through shared memory, written by TMA.
template <class Traits>
__device__ __forceinline__ void store_tile(const Arguments& args, const Work& work, int consumer,
                                           unsigned char* sO,
                                           const float (&o)[Traits::kHeadDimV / 2]) {
  const int lane = threadIdx.x % kWarp;
  const int tile_row = threadIdx.x % kGroupThreads / kWarp * 16 + lane % 16;
  const bool leader = threadIdx.x % kGroupThreads == 0;
#pragma unroll
  for (int group = 0; group < Traits::kHeadDimV / 8; group += 2) {
    const int chunk = group / 8, place = chunk % Traits::kStagedO;
    if (group % 8 == 0 && place == 0) {
      if (leader) wait_stores_read<0>();
      named_sync(kStaged + consumer, kGroupThreads);  // TMA has read what lay there
    }
    uint32_t tile[4];  // columns 8 group..., rows 0-7 and 8-15, then the next 8 columns
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      tile[i] = pack_pair<typename Traits::Output>(o[4 * group + 2 * i], o[4 * group + 2 * i + 1]);
    }
    const int unit = (group % 8 + lane / 16) ^ lane % 8;  // 128-byte swizzle
    store_tiles(sO + (place * kGroupRows + tile_row) * kChunkBytes + unit * 16, tile);
    if ((group + 2) % (8 * Traits::kStagedO) != 0 && group + 2 < Traits::kHeadDimV / 8) continue;
    fence_async_proxy();
    named_sync(kStaged + consumer, kGroupThreads);  // complete, and TMA may read it
    if (!leader) continue;
    const int row = int(work.sequence.row_q) + work.row + consumer * kGroupRows;
#pragma unroll
    for (int i = 0; i <= place; ++i) {
      store_box(args.o, sO + i * kGroupRows * kChunkBytes,
                {(chunk - place + i) * Traits::kChunkColumns, row, work.head, work.batch});
    }
    commit_stores();
  }
}

// O and LSE of a consumer's rows; thread_row is this thread's first row in the tile.
template <class Traits>
__device__ __forceinline__ void store_state(const Arguments& args, const Work& work, int consumer,
                                            int thread_row, unsigned char* sO,
                                            const float (&o)[Traits::kHeadDimV / 2],
                                            const float (&lse)[2]) {
  const ForwardParams& p = args.p;
  const int row = work.row + thread_row;
  const int end_row = work.row + (consumer + 1) * kGroupRows;
  const bool inside = !p.cu_seqlens_q || end_row <= work.sequence.seqlen_q;
  bool staged = false;
  if constexpr (Traits::kStagesO) {
    staged = inside && !work.poisoned && sO != nullptr;
    if (staged) store_tile<Traits>(args, work, consumer, sO, o);
  }
  if (!staged) store_rows<Traits>(p, work, row, o);
  float* gLSE =
      p.lse.data + work.batch * p.lse.batch + work.head * p.lse.head + work.sequence.row_q + row;
  if (threadIdx.x % 4 == 0 && p.lse.data != nullptr) {
    if (row < work.sequence.seqlen_q) gLSE[0] = lse[0];
    if (row + 8 < work.sequence.seqlen_q) gLSE[8] = lse[1];
  }
}

// A tile whose rows see no key: O = 0, lse = -inf. One warp.
template <class Traits>
__device__ __forceinline__ void store_nothing(const ForwardParams& p, const Work& work) {
  const int rows = min(Traits::kBlockQ, work.sequence.seqlen_q - work.row);
  const int64_t first_row = work.sequence.row_q + work.row;
  auto* gO = static_cast<typename Traits::Output*>(p.o.data) + work.batch * p.o.batch +
             first_row * p.o.row + work.head * p.o.head;
  const int vectors = p.head_dim_v / 8;
#pragma unroll 1
  for (int i = threadIdx.x % kWarp; i < rows * vectors; i += kWarp) {
    *reinterpret_cast<uint4*>(gO + i / vectors * p.o.row + i % vectors * 8) = {0, 0, 0, 0};
  }
  float* lse = p.lse.data + work.batch * p.lse.batch + work.head * p.lse.head + first_row;
#pragma unroll 1
  for (int i = threadIdx.x % kWarp; i < rows && p.lse.data != nullptr; i += kWarp) {
    lse[i] = -INFINITY;
  }
}

}  // namespace flash::v3
