// Global to shared memory: K and V once per slice through a ring of stages, Q at every visit.
#pragma once

#include "common/ptx.cuh"
#include "v1_tiling/schedule.cuh"
#include "v1_tiling/split.cuh"

namespace flash::v1 {

inline constexpr int kGroup = 8;  // rows of fp32 K or V that a warp copies and splits together

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
  // Plain loads, before sm_80, wait in registers.
  constexpr int kCopiesAtOnce = Traits::kAsyncCopies ? 4 : 1;
  int row = thread / Rows::kChunks;
  const auto* from = source + row * stride + chunk * Traits::kChunkElements;
#pragma unroll kCopiesAtOnce
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

// Starts the copy of the Q block of this visit.
template <class Traits>
__device__ __forceinline__ void load_q(Shared<Traits>& smem, const ForwardParams& p,
                                       const Tile<Traits>& tile) {
  const auto* gQ = static_cast<const typename Traits::Element*>(p.q.data) + tile.batch * p.q.batch +
                   tile.head * p.q.head +
                   (tile.sequence.row_q + tile.warp_row) * p.q.row;  // (kRowsPerWarp, kHeadDim)
  if (tile.absent) return;
  __syncwarp();  // no lane reads the last Q block any more
  load_rows<Traits, Traits::kRowsPerWarp>(
      smem.q(), gQ, p.q.row, tile.sequence.seqlen_q - tile.warp_row,
      Traits::kFloat32 ? Traits::kHeadDim : p.head_dim, threadIdx.x % 32, 32);
  load_scales<Traits::kFloat32, Traits::kRowsPerWarp>(
      smem.q_scales(), p.q_descale, tile.batch, tile.head, tile.sequence.row_q + tile.warp_row,
      tile.sequence.seqlen_q - tile.warp_row, threadIdx.x % 32);
  barrier_arrive_copies(smem.q_full());
}

// Afterwards Q is visible to this warp.
template <class Traits>
__device__ __forceinline__ void wait_q(Shared<Traits>& smem, const Tile<Traits>& tile) {
  if (!tile.absent) barrier_wait(smem.q_full(), smem.q_round++);
}

// fp32: each warp copies rows of K and V in groups, and splits them: run(first row of a group).
template <class Traits, class Run>
__device__ __forceinline__ void for_groups(Run run) {
  const int warp = opaque(threadIdx.x) / 32, warps = blockDim.x / 32;
#pragma unroll 1
  for (int row = warp * kGroup; row < Traits::kBlockKV; row += warps * kGroup) run(row);
}

template <class Traits>
__device__ __forceinline__ void copy_group(uint32_t block, const float* source, int64_t stride,
                                           int row, int rows, int dim) {
  load_rows<Traits, kGroup>(block + row * Traits::Rows::kRowBytes, source + row * stride, stride,
                            rows - row, dim, threadIdx.x % 32, 32);
}

// In place, by the lanes that copied it.
template <class Traits>
__device__ __forceinline__ void split_group(uint32_t block, uint32_t scales, int row) {
  using Rows = typename Traits::Rows;
  constexpr int kLanes = Rows::kChunks, kStep = 32 / kLanes, kAtOnce = 4;
  const int thread = opaque(threadIdx.x) % 32, lane = thread % kLanes;
  block += row * Rows::kRowBytes, scales += row * 4;
#pragma unroll
  for (int first = 0; first < kGroup; first += kAtOnce * kStep) {
    SplitRows<kAtOnce> rows;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      uint32_t words[4];
      load_shared_16(words, block + Rows::offset(first + i * kStep + thread / kLanes, lane));
#pragma unroll
      for (int e = 0; e < 4; ++e) rows.x[i][e] = __uint_as_float(words[e]);
    }
    rows.split_all(kLanes);
    __syncwarp();  // every lane has read its values
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int r = first + i * kStep + thread / kLanes;
      const uint32_t half = lane % 2 * 8;
      store_shared_8(block + Rows::offset(r, lane / 2) + half, rows.high[i]);
      store_shared_8(block + Rows::offset(r, (kLanes + lane) / 2) + half, rows.low[i]);
      if (lane == 0) store_shared_4(scales + 4 * r, __float_as_uint(rows.unit[i]));
    }
  }
}

// fp32: K_j and V_j arrive when every warp has split the rows that it copied.
template <class Traits>
__device__ __forceinline__ void split_kv(Shared<Traits>& smem, int j) {
  if constexpr (Traits::kFloat32) {
    cp_async_wait<0>();  // what this thread copied has arrived
    for_groups<Traits>([&](int row) {
      split_group<Traits>(smem.k(j), smem.k_scales(j), row);
      split_group<Traits>(smem.v(j), smem.v_scales(j), row);
    });
    barrier_arrive(smem.kv_full(j));
  }
}

// Before block j is waited for: starts the copies of blocks to come, of this slice and then of the
// next, where every warp has left what lay in their place. A block that this warp itself left only
// just now may still be in use, so its place is filled one block later.
template <class Traits>
__device__ __forceinline__ void load_kv(Shared<Traits>& smem, const ForwardParams& p,
                                        const Tile<Traits>& tile, const Tile<Traits>& next,
                                        int j_now) {
  using Element = typename Traits::Element;
  if (tile.turn > 0 && !tile.last_turn) return;  // no place has become free
  Ring& ring = smem.ring;
  int left = tile.pass.begin;  // blocks before this one are left
  if (tile.turn == 0 && j_now == left) --left;
  if (tile.last_turn) left = max(left, j_now - 1);
  const int ahead = next.blocks.begin - tile.blocks.end;
  const int end = min(max(j_now + 1, left + ring.stages), next.blocks.end - ahead);
  for (; ring.loaded < end; ++ring.loaded) {
    const int j = ring.loaded;
    if (ring.round(j) > 0) barrier_wait(smem.kv_free(j), ring.round(j) - 1);
    const Tile<Traits>& from = j < tile.blocks.end ? tile : next;
    const int first = (j < tile.blocks.end ? j : j + ahead) * Traits::kBlockKV;
    const int64_t row = from.sequence.row_k + first;
    const int rows = from.sequence.seqlen_k - first;
    const auto* gK = static_cast<const Element*>(p.k.data) + from.batch * p.k.batch +
                     from.head_kv * p.k.head + row * p.k.row;  // (kBlockKV, kHeadDim)
    const auto* gV = static_cast<const Element*>(p.v.data) + from.batch * p.v.batch +
                     from.head_kv * p.v.head + row * p.v.row;  // (kBlockKV, kHeadDim)
    if constexpr (Traits::kFloat32) {
      for_groups<Traits>([&](int row) {
        copy_group<Traits>(smem.k(j), gK, p.k.row, row, rows, p.head_dim);
        copy_group<Traits>(smem.v(j), gV, p.v.row, row, rows, p.head_dim_v);
      });
      cp_async_commit();  // split_kv() arrives
    } else {
      load_rows<Traits, Traits::kBlockKV>(smem.k(j), gK, p.k.row, rows, p.head_dim, threadIdx.x,
                                          blockDim.x);
      load_rows<Traits, Traits::kBlockKV>(smem.v(j), gV, p.v.row, rows, p.head_dim_v, threadIdx.x,
                                          blockDim.x);
      barrier_arrive_copies(smem.kv_full(j));
    }
  }
}

// Afterwards K_j and V_j are visible to this warp.
template <class Traits>
__device__ __forceinline__ void wait_kv(Shared<Traits>& smem, const Tile<Traits>& tile, int j) {
  if (tile.turn > 0) return;
  split_kv(smem, j);
  barrier_wait(smem.kv_full(j), smem.ring.round(j));
}

// After its last Q block, this warp reads block j no more. When all warps have said so, another
// block may take its place.
template <class Traits>
__device__ __forceinline__ void release_kv(Shared<Traits>& smem, const Tile<Traits>& tile, int j) {
  if (tile.last_turn) barrier_arrive(smem.kv_free(j));
}

}  // namespace flash::v1
