// Global to shared memory: copies of blocks of Q, K and V, and what must not stay in V.
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

// The copy of one block, one chunk of each thread at a time: kRows rows of kDim elements, of which
// `rows` and `dim` exist. The rest becomes zeros, so that no stray NaN is ever multiplied.
template <class Traits, int kRows, int kDim>
struct BlockCopy {
  using Map = CopyMap<kDim, Traits::kThreads>;
  using Element = typename Traits::Element;
  static_assert(kRows % Map::kRowsPerPass == 0, "every pass is full");
  static constexpr int kPerRow = Map::kChunks / Map::kLanesPerRow;
  static constexpr int kChunks = kRows / Map::kRowsPerPass * kPerRow;

  uint32_t target;
  const Element* source;
  int64_t stride;
  int rows, dim;

  BlockCopy() = default;
  __device__ __forceinline__ BlockCopy(uint32_t block, const Element* first, int64_t stride,
                                       int rows, int dim)
      : stride(stride) {
    const Map map;
    target = block + map.offset;
    source = first + map.row * stride + map.chunk * 8;
    this->rows = rows - map.row;
    this->dim = dim - map.chunk * 8;
  }

  // Starts the copy of chunk i; in order, from 0.
  __device__ __forceinline__ void issue(int i) {
    const int row = i / kPerRow * Map::kRowsPerPass, chunk = i % kPerRow * Map::kLanesPerRow;
    if (row > 0 && chunk == 0) source += Map::kRowsPerPass * stride;
    const bool in_range = row < rows && chunk * 8 < dim;
    if constexpr (Traits::kFeatured) {
      if (reinterpret_cast<uint64_t>(source) % 16 != 0) {
        return copy_unaligned(target + Map::distance(row, chunk), source + chunk * 8, in_range);
      }
    }
    cp_async_16(target + Map::distance(row, chunk), source + chunk * 8, in_range);
  }

 private:
  // Eight elements one by one, from a row that is not 16-byte aligned.
  static __device__ __forceinline__ void copy_unaligned(uint32_t target, const Element* source,
                                                        bool in_range) {
    uint32_t words[4] = {};
    if (in_range) {
      const auto* halves = reinterpret_cast<const uint16_t*>(source);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = halves[2 * i] | uint32_t(halves[2 * i + 1]) << 16;
    }
    store_shared_16(target, words);
  }
};

template <class Traits>
__device__ __forceinline__ void load_q(const Shared<Traits>& smem, const ForwardParams& p,
                                       const Tile<Traits>& tile) {
  if (tile.blocks.begin >= tile.blocks.end) return;
  const auto* gQ = static_cast<const typename Traits::Element*>(p.q.data) + tile.batch * p.q.batch +
                   tile.head * p.q.head +
                   (tile.sequence.row_q + tile.row) * p.q.row;  // (kBlockQ, kHeadDim)
  using Copy = BlockCopy<Traits, Traits::kBlockQ, Traits::kHeadDim>;
  Copy copy(smem.q, gQ, p.q.row, tile.sequence.seqlen_q - tile.row, p.head_dim);
#pragma unroll
  for (int i = 0; i < Copy::kChunks; ++i) copy.issue(i);
}

// The first row of K_j or V_j, and how many rows on from there the Q block may see: keys past the
// last of them are not read.
template <class Traits>
__device__ __forceinline__ const typename Traits::Element* first_key(const View& view,
                                                                     const Tile<Traits>& tile,
                                                                     int j) {
  return static_cast<const typename Traits::Element*>(view.data) + tile.batch * view.batch +
         tile.head_kv * view.head + (tile.sequence.row_k + j * Traits::kBlockKV) * view.row;
}
template <class Traits>
__device__ __forceinline__ int keys_from(const Tile<Traits>& tile, int j) {
  return tile.last_key - j * Traits::kBlockKV;
}

// Calls visit(address) for each chunk of V_j that this thread has copied.
template <class Traits, class Visit>
__device__ __forceinline__ void visit_own_values(const Shared<Traits>& smem, int j, Visit visit) {
  using Map = CopyMap<Traits::kHeadDimV, Traits::kThreads>;
  const uint32_t sV = smem.v(j) + Map().offset;
#pragma unroll(Traits::kWide ? 1 : Traits::kBlockKV)
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

// Arrives, and returns when the phase that this was part of has ended.
__device__ __forceinline__ void barrier_arrive_and_wait(uint32_t barrier) {
  asm volatile(
      "{ .reg .b64 state; .reg .pred done; mbarrier.arrive.shared.b64 state, [%0]; "
      "WAIT: mbarrier.test_wait.shared.b64 done, [%0], state; @!done bra WAIT; }" ::"r"(barrier)
      : "memory");
}

// Removes NaN and infinities from V_j on an edge, where some rows must not see some keys: 0 * V_j
// would spread them to those rows. The result says whether there were any. Every thread's own
// copies of V_j have arrived before, and are visible to every warp afterwards.
template <class Traits>
__device__ __forceinline__ bool clean_v(const Shared<Traits>& smem, int j) {
  if constexpr (Traits::kWide) {  // warps come from two places, to a barrier in shared memory
    if (holds_non_finite(smem, j)) {
      clear_non_finite(smem, j);
      store_shared_4(smem.poisoned(), 1);
    }
    barrier_arrive_and_wait(smem.barrier(Shared<Traits>::kCleanV));  // V_j is finite for every warp
    return load_shared_4(smem.poisoned()) != 0;
  }
  if (!__syncthreads_or(holds_non_finite(smem, j))) return false;
  clear_non_finite(smem, j);
  __syncthreads();  // V_j is finite for every warp
  return true;
}

}  // namespace flash::v2
