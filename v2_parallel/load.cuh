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
  static constexpr int kChunks = kDim / 8;

  // Of this thread's first chunk. Computed at each use: registers are for accumulators.
  const unsigned thread = opaque(unsigned(threadIdx.x));
  const int row = int(thread / kLanesPerRow);
  const int chunk = int(thread % kLanesPerRow);
  const int offset = SwizzledRows<kDim>::offset(row, chunk);

  // The distance in bytes of the chunk that lies so many rows and chunks from the first.
  static __device__ __forceinline__ constexpr int distance(int rows, int chunks) {
    return rows * SwizzledRows<kDim>::kRowBytes + chunks * 16;
  }
};

// The same copy, eight elements one by one, for rows that are not 16-byte aligned.
template <int kRows, class Map, class Element>
__device__ __forceinline__ void load_unaligned(const Map& map, uint32_t target,
                                               const Element* source, int64_t stride, int rows,
                                               int dim) {
#pragma unroll 1
  for (int row = 0; row < kRows; row += Map::kRowsPerPass, source += Map::kRowsPerPass * stride) {
#pragma unroll 1
    for (int chunk = 0; chunk < Map::kChunks; chunk += Map::kLanesPerRow) {
      uint32_t words[4] = {};
      if (row < rows && chunk * 8 < dim) {
        const auto* halves = reinterpret_cast<const uint16_t*>(source + chunk * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = halves[2 * i] | uint32_t(halves[2 * i + 1]) << 16;
      }
      store_shared_16(target + Map::distance(row, chunk), words);
    }
  }
}

// This thread's chunks of a block of `rows` rows with `dim` elements, the first at `source`. What
// is missing to a full block becomes zeros, so that no stray NaN is ever multiplied.
template <class Traits, int kRows, int kDim>
__device__ __forceinline__ void load_rows(uint32_t target, const typename Traits::Element* source,
                                          int64_t stride, int rows, int dim) {
  using Map = CopyMap<kDim, Traits::kThreads>;
  static_assert(kRows % Map::kRowsPerPass == 0, "every pass is full");
  auto copy = [&](auto in_range) {
#pragma unroll
    for (int row = 0; row < kRows; row += Map::kRowsPerPass, source += Map::kRowsPerPass * stride) {
#pragma unroll
      for (int chunk = 0; chunk < Map::kChunks; chunk += Map::kLanesPerRow) {
        cp_async_16(target + Map::distance(row, chunk), source + chunk * 8, in_range(row, chunk));
      }
    }
  };
  const Map map;
  target += map.offset;
  source += map.row * stride + map.chunk * 8;
  if constexpr (Traits::kFeatured) {
    if (reinterpret_cast<uint64_t>(source) % 16 != 0 || stride % 8 != 0) {
      return load_unaligned<kRows>(map, target, source, stride, rows - map.row,
                                   dim - map.chunk * 8);
    }
  }
  if (rows >= kRows && dim == kDim) {
    copy([](int, int) { return true; });
  } else {
    rows -= map.row;
    dim -= map.chunk * 8;
    copy([&](int row, int chunk) { return row < rows && chunk * 8 < dim; });
  }
}

template <class Traits>
__device__ __forceinline__ void load_q(const Shared<Traits>& smem, const ForwardParams& p,
                                       const Tile<Traits>& tile) {
  if (tile.blocks.begin >= tile.blocks.end) return;
  const auto* gQ = static_cast<const typename Traits::Element*>(p.q.data) + tile.batch * p.q.batch +
                   tile.head * p.q.head +
                   (tile.sequence.row_q + tile.row) * p.q.row;  // (kBlockQ, kHeadDim)
  load_rows<Traits, Traits::kBlockQ, Traits::kHeadDim>(
      smem.q, gQ, p.q.row, tile.sequence.seqlen_q - tile.row, p.head_dim);
}

// Starts the copy of block j, if there is one, and closes its group.
template <class Traits>
__device__ __forceinline__ void load_kv(const Shared<Traits>& smem, const ForwardParams& p,
                                        const Tile<Traits>& tile, int j) {
  using Element = typename Traits::Element;
  if (j < tile.blocks.end) {
    const int key = j * Traits::kBlockKV;
    const int keys = tile.last_key - key;  // those past the last visible one are not read
    const auto* gK = static_cast<const Element*>(p.k.data) + tile.batch * p.k.batch +
                     tile.head_kv * p.k.head +
                     (tile.sequence.row_k + key) * p.k.row;  // (kBlockKV, kHeadDim)
    const auto* gV = static_cast<const Element*>(p.v.data) + tile.batch * p.v.batch +
                     tile.head_kv * p.v.head +
                     (tile.sequence.row_k + key) * p.v.row;  // (kBlockKV, kHeadDimV)
    load_rows<Traits, Traits::kBlockKV, Traits::kHeadDim>(smem.k(j), gK, p.k.row, keys, p.head_dim);
    load_rows<Traits, Traits::kBlockKV, Traits::kHeadDimV>(smem.v(j), gV, p.v.row, keys,
                                                           p.head_dim_v);
  }
  cp_async_commit();
}

// Calls visit(address) for each chunk of V_j that this thread has copied.
template <class Traits, class Visit>
__device__ __forceinline__ void visit_own_values(const Shared<Traits>& smem, int j, Visit visit) {
  using Map = CopyMap<Traits::kHeadDimV, Traits::kThreads>;
  const uint32_t sV = smem.v(j) + Map().offset;
#pragma unroll
  for (int row = 0; row < Traits::kBlockKV; row += Map::kRowsPerPass) {
#pragma unroll
    for (int chunk = 0; chunk < Map::kChunks; chunk += Map::kLanesPerRow) {
      visit(sV + Map::distance(row, chunk));
    }
  }
}

// Do they hold NaN or infinity? Its own copies are visible to a thread before any barrier.
template <class Traits>
__device__ __forceinline__ bool holds_non_finite(const Shared<Traits>& smem, int j) {
  using Element = typename Traits::Element;
  uint32_t trace = 0;  // a sum of 0 * v: NaN as soon as one v is not finite
  visit_own_values(smem, j, [&](uint32_t address) {
    uint32_t words[4];
    load_shared_16(words, address);
#pragma unroll
    for (int i = 0; i < 4; ++i) trace = multiply_add<Element>(words[i], 0, trace);
  });
  return any_non_finite<Element>(trace);
}

// Makes their NaN and infinities zeros.
template <class Traits>
__device__ __forceinline__ void clear_non_finite(const Shared<Traits>& smem, int j) {
  using Element = typename Traits::Element;
  visit_own_values(smem, j, [&](uint32_t address) {
    uint32_t words[4];
    load_shared_16(words, address);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (any_non_finite<Element>(words[i] & 0xffff)) words[i] &= 0xffff0000;
      if (any_non_finite<Element>(words[i] & 0xffff0000)) words[i] &= 0xffff;
    }
    store_shared_16(address, words);
  });
}

// Waits for block j. Afterwards K_j, V_j (and Q) are visible to every warp, and no warp reads
// block j - 1 any more: its stage may be filled again. True when some rows must not see all of
// V_j and it holds NaN or infinity, which 0 * V_j would spread.
template <class Traits>
__device__ __forceinline__ bool wait_kv(const Shared<Traits>& smem, const Tile<Traits>& tile,
                                        int j) {
  cp_async_wait<Traits::kStages - 2>();
  if (!tile.clean.holds(j)) return __syncthreads_or(holds_non_finite(smem, j));
  __syncthreads();
  return false;
}

}  // namespace flash::v2
