// Global to shared memory: Q once, K and V block by block through a ring of stages.
#pragma once

#include "common/ptx.cuh"
#include "v2_parallel/schedule.cuh"

namespace flash::v2 {

// How the threads of a CTA share the 16-byte chunks of a block of rows: 4 or 8 neighbours copy
// consecutive chunks of one row. A thread's chunks are the same whichever stage they lie in.
template <int kDim, int kThreads>
struct CopyMap {
  static constexpr int kLanesPerRow = kDim % 64 == 0 ? 8 : 4;
  static constexpr int kRowsPerPass = kThreads / kLanesPerRow;
  static constexpr int kChunksPerLane = kDim / 8 / kLanesPerRow;

  // Calls visit(row, chunk, byte offset in shared memory) for each chunk of this thread.
  template <int kRows, class Visit>
  static __device__ __forceinline__ void for_each(Visit visit) {
    static_assert(kRows % kRowsPerPass == 0, "every pass is full");
    const int lane_row = threadIdx.x / kLanesPerRow;
    const int lane_chunk = threadIdx.x % kLanesPerRow;
    const int offset = SwizzledRows<kDim>::offset(lane_row, lane_chunk);
#pragma unroll
    for (int row = 0; row < kRows; row += kRowsPerPass) {
#pragma unroll
      for (int chunk = 0; chunk < kDim / 8; chunk += kLanesPerRow) {
        visit(lane_row + row, lane_chunk + chunk,
              offset + row * SwizzledRows<kDim>::kRowBytes + chunk * 16);
      }
    }
  }
};

// Eight elements one by one, for rows that are not 16-byte aligned.
template <class Element>
__device__ __forceinline__ void copy_unaligned(uint32_t target, const Element* source,
                                               bool in_range) {
  uint32_t words[4] = {};
  if (in_range) {
    const auto* halves = reinterpret_cast<const uint16_t*>(source);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = halves[2 * i] | uint32_t(halves[2 * i + 1]) << 16;
  }
  store_shared_16(target, words);
}

// Rows [0, rows) of `source`, `dim` elements each; the rest of the block becomes zeros, so that
// no stray NaN is ever multiplied.
template <class Traits, int kRows, int kDim>
__device__ __forceinline__ void load_rows(uint32_t target, const typename Traits::Element* source,
                                          int64_t stride, int rows, int dim) {
  using Map = CopyMap<kDim, Traits::kThreads>;
  bool aligned = true;
  if constexpr (Traits::kFeatured) {
    aligned = (reinterpret_cast<uint64_t>(source) % 16 == 0) && stride % 8 == 0;
  }
  Map::template for_each<kRows>([&](int row, int chunk, int offset) {
    const auto* from = source + row * stride + chunk * 8;
    const bool in_range = row < rows && chunk * 8 < dim;
    if (aligned) {
      cp_async_16(target + offset, from, in_range);
    } else {
      copy_unaligned(target + offset, from, in_range);
    }
  });
}

template <class Traits>
__device__ __forceinline__ void load_q(Shared<Traits>& smem, const ForwardParams& p,
                                       const Tile<Traits>& tile) {
  if (tile.blocks.begin >= tile.blocks.end) return;
  const auto* gQ = static_cast<const typename Traits::Element*>(p.q.data) + tile.batch * p.q.batch +
                   tile.head * p.q.head +
                   (tile.sequence.row_q + tile.row) * p.q.row;  // (kBlockQ, kHeadDim)
  load_rows<Traits, Traits::kBlockQ, Traits::kHeadDim>(
      shared_address(smem.q), gQ, p.q.row, tile.sequence.seqlen_q - tile.row, p.head_dim);
}

// Starts the copy of block j, if there is one, and closes its group.
template <class Traits>
__device__ __forceinline__ void load_kv(Shared<Traits>& smem, const ForwardParams& p,
                                        const Tile<Traits>& tile, int j) {
  using Element = typename Traits::Element;
  if (j < tile.blocks.end) {
    const int key = j * Traits::kBlockKV;
    const int64_t row = tile.sequence.row_k + key;
    const auto* gK = static_cast<const Element*>(p.k.data) + tile.batch * p.k.batch +
                     tile.head_kv * p.k.head + row * p.k.row;  // (kBlockKV, kHeadDim)
    const auto* gV = static_cast<const Element*>(p.v.data) + tile.batch * p.v.batch +
                     tile.head_kv * p.v.head + row * p.v.row;  // (kBlockKV, kHeadDimV)
    auto& stage = smem.stage(j);
    const int keys = tile.keys.end - key;  // keys past the last visible one are not read
    load_rows<Traits, Traits::kBlockKV, Traits::kHeadDim>(shared_address(stage.k), gK, p.k.row,
                                                          keys, p.head_dim);
    load_rows<Traits, Traits::kBlockKV, Traits::kHeadDimV>(shared_address(stage.v), gV, p.v.row,
                                                           keys, p.head_dim_v);
  }
  cp_async_commit();
}

// Does this thread's part of V_j hold NaN or infinity? Its own copies are visible to it already.
template <class Traits>
__device__ __forceinline__ bool holds_non_finite(Shared<Traits>& smem, int j) {
  using Element = typename Traits::Element;
  const uint32_t sV = shared_address(smem.stage(j).v);
  uint32_t trace = 0;  // a sum of 0 * v: NaN as soon as one v is not finite
  CopyMap<Traits::kHeadDimV, Traits::kThreads>::template for_each<Traits::kBlockKV>(
      [&](int, int, int offset) {
        uint32_t words[4];
        load_shared_16(words, sV + offset);
#pragma unroll
        for (int i = 0; i < 4; ++i) trace = multiply_add<Element>(words[i], 0, trace);
      });
  return any_non_finite<Element>(trace);
}

// NaN and infinities of this thread's part of V_j become zeros.
template <class Traits>
__device__ __forceinline__ void clear_non_finite(Shared<Traits>& smem, int j) {
  using Element = typename Traits::Element;
  const uint32_t sV = shared_address(smem.stage(j).v);
  CopyMap<Traits::kHeadDimV, Traits::kThreads>::template for_each<Traits::kBlockKV>(
      [&](int, int, int offset) {
        uint32_t words[4];
        load_shared_16(words, sV + offset);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (any_non_finite<Element>(words[i] & 0xffff)) words[i] &= 0xffff0000;
          if (any_non_finite<Element>(words[i] & 0xffff0000)) words[i] &= 0xffff;
        }
        store_shared_16(sV + offset, words);
      });
}

// Waits for block j. Afterwards K_j, V_j (and Q) are visible to every warp, and no warp reads
// block j - 1 any more: its stage may be filled again. True when some rows must not see all of
// V_j and it holds NaN or infinity, which 0 * V_j would spread.
template <class Traits>
__device__ __forceinline__ bool wait_kv(Shared<Traits>& smem, const Tile<Traits>& tile, int j) {
  cp_async_wait<Traits::kStages - 2>();
  if (!tile.all_visible(j)) return __syncthreads_or(holds_non_finite(smem, j));
  __syncthreads();
  return false;
}

}  // namespace flash::v2
