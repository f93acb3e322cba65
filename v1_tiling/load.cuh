// Global to shared memory: K and V once per slice through a ring of stages, Q at every visit.
#pragma once

#include "common/ptx.cuh"
#include "v1_tiling/schedule.cuh"

namespace flash::v1 {

// One chunk, element by element, for rows that are not 16-byte aligned.
template <class Element>
__device__ __forceinline__ void copy_unaligned(uint32_t target, const Element* source,
                                               bool in_range) {
  constexpr int kElements = 16 / int(sizeof(Element));
  alignas(16) Element x[kElements] = {};
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    if (in_range) x[e] = source[e];
  }
  store_shared_16(target, reinterpret_cast<const uint32_t (&)[4]>(x));
}

// Rows [0, rows) of `source`, `dim` elements each, by `threads` neighbouring threads; the rest of
// the kRows becomes zeros, so that no stray NaN is ever multiplied.
template <class Traits, int kRows>
__device__ __forceinline__ void load_rows(uint32_t target, const typename Traits::Element* source,
                                          int64_t stride, int rows, int dim, int thread,
                                          int threads) {
  using Rows = typename Traits::Rows;
  bool aligned = true;
  if constexpr (Traits::kFeatured) {
    aligned =
        (reinterpret_cast<uint64_t>(source) % 16 == 0) && stride % Traits::kChunkElements == 0;
  }
  thread = opaque(thread);
  const int chunk = thread % Rows::kChunks;
  const int step = threads / Rows::kChunks;
  const bool in_columns = chunk * Traits::kChunkElements < dim;
  int row = thread / Rows::kChunks;
  const auto* from = source + row * stride + chunk * Traits::kChunkElements;
#pragma unroll 4
  for (; row < kRows; row += step, from += step * stride) {
    const bool in_range = in_columns && row < rows;
    if (aligned) {
      cp_async_16(target + Rows::offset(row, chunk), in_range ? from : source, in_range);
    } else {
      copy_unaligned(target + Rows::offset(row, chunk), from, in_range);
    }
  }
  if (!aligned) __threadfence_block();  // plain stores come before the arrival that follows
}

// Starts the copy of this warp's Q block number `q_block` of the slice.
template <class Traits>
__device__ __forceinline__ void load_q(Shared<Traits>& smem, const ForwardParams& p,
                                       const Tile<Traits>& tile, int q_block) {
  const int row = tile.row + q_block * Traits::kRowsPerWarp;
  const auto* gQ = static_cast<const typename Traits::Element*>(p.q.data) + tile.batch * p.q.batch +
                   tile.head * p.q.head +
                   (tile.sequence.row_q + row) * p.q.row;  // (kRowsPerWarp, kHeadDim)
  __syncwarp();  // no lane reads the last Q block any more
  load_rows<Traits, Traits::kRowsPerWarp>(smem.q(), gQ, p.q.row, tile.sequence.seqlen_q - row,
                                          p.head_dim, threadIdx.x % 32, 32);
  barrier_arrive_copies(smem.q_full());
}

// Afterwards Q is visible to this warp.
template <class Traits>
__device__ __forceinline__ void wait_q(Shared<Traits>& smem) {
  barrier_wait(smem.q_full(), smem.q_round++);
}

// Starts the copy of block j, if there is one, once every warp has left what lay in its place.
template <class Traits>
__device__ __forceinline__ void load_kv(Shared<Traits>& smem, const ForwardParams& p,
                                        const Tile<Traits>& tile, int j) {
  using Element = typename Traits::Element;
  if (j >= tile.blocks.end) return;
  if (smem.ring.round(j) > 0) barrier_wait(smem.kv_free(j), smem.ring.round(j) - 1);
  const int64_t row = tile.sequence.row_k + j * Traits::kBlockKV;
  const int rows = tile.sequence.seqlen_k - j * Traits::kBlockKV;
  const auto* gK = static_cast<const Element*>(p.k.data) + tile.batch * p.k.batch +
                   tile.head_kv * p.k.head + row * p.k.row;  // (kBlockKV, kHeadDim)
  const auto* gV = static_cast<const Element*>(p.v.data) + tile.batch * p.v.batch +
                   tile.head_kv * p.v.head + row * p.v.row;  // (kBlockKV, kHeadDim)
  load_rows<Traits, Traits::kBlockKV>(smem.k(j), gK, p.k.row, rows, p.head_dim, threadIdx.x,
                                      blockDim.x);
  load_rows<Traits, Traits::kBlockKV>(smem.v(j), gV, p.v.row, rows, p.head_dim_v, threadIdx.x,
                                      blockDim.x);
  barrier_arrive_copies(smem.kv_full(j));
}

// Afterwards K_j and V_j are visible to this warp.
template <class Traits>
__device__ __forceinline__ void wait_kv(const Shared<Traits>& smem, int j) {
  barrier_wait(smem.kv_full(j), smem.ring.round(j));
}

// This warp reads block j no more. When all warps have said so, another block takes its place; so
// that no warp waits for the slowest here, that happens one block later, or at the end of the pass.
template <class Traits>
__device__ __forceinline__ void release_kv(Shared<Traits>& smem, const ForwardParams& p,
                                           const Tile<Traits>& tile, Range pass, int j) {
  __syncwarp();  // every lane has read its fragments
  if (threadIdx.x % 32 == 0) barrier_arrive(smem.kv_free(j));
  if (j > pass.begin) load_kv(smem, p, tile, j - 1 + smem.ring.stages);
  if (j == pass.end - 1) load_kv(smem, p, tile, j + smem.ring.stages);
}

}  // namespace flash::v1
