// Backward, global to shared memory: blocks of rows, zeros where there are none.
#pragma once

#include "common/mask.cuh"
#include "common/ptx.cuh"
#include "common/workspace_backward.cuh"

namespace flash {

// One query block of one head; `blocks` per sequence.
template <int kRows>
struct RowBlock {
  int row, head, batch;

  __device__ __forceinline__ RowBlock(const BackwardParams& p, int blocks) {
    const int64_t index = blockIdx.x;
    row = int(index % blocks) * kRows;
    head = int(index / blocks % p.heads_q);
    batch = int(index / blocks / p.heads_q);
  }
};

// Row `row` of one head of one sequence, whose rows start at `first`.
template <class Element>
__device__ __forceinline__ Element* row_of(const View& view, int batch, int64_t first, int head,
                                           int row) {
  return static_cast<Element*>(view.data) + batch * view.batch + (first + row) * view.row +
         head * view.head;
}

// Zeros in place of NaN and infinities; true if there was any.
template <class Element>
__device__ __forceinline__ bool remove_non_finite(uint32_t (&words)[4]) {
  bool found = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t before = words[i];
    if constexpr (sizeof(Element) == 4) {
      if ((before & 0x7f800000u) == 0x7f800000u) words[i] = 0;
    } else {
      constexpr uint32_t kLow = kExponentBits<Element>, kHigh = kLow << 16;
      if ((before & kLow) == kLow) words[i] &= 0xffff0000u;
      if ((before & kHigh) == kHigh) words[i] &= 0x0000ffffu;
    }
    found |= words[i] != before;
  }
  return found;
}

template <class Element>
__device__ __forceinline__ bool rows_aligned(const Element* data, int64_t stride) {
  return reinterpret_cast<uint64_t>(data) % 16 == 0 && stride % (16 / int(sizeof(Element))) == 0;
}

// How the threads of a CTA share the 16-byte chunks of a block of rows: 4 or 8 neighbours take
// consecutive chunks of one row.
template <class Traits>
struct BlockCopy {
  using Rows = typename Traits::Rows;
  static constexpr int kLanesPerRow = Rows::kSpan;
  static constexpr int kRowsPerPass = Traits::kThreads / kLanesPerRow;

  // Calls visit(row, chunk, byte offset in shared memory, pointer) for each chunk of this thread;
  // `data` is the block's first row. One pointer walks down the rows: many would need registers.
  template <int kRows, class Pointer, class Visit>
  static __device__ __forceinline__ void for_each(Pointer data, int64_t stride, Visit visit) {
    static_assert(kRows % kRowsPerPass == 0 && kRowsPerPass % 8 == 0);
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // positions are computed again: kept, they would spill
    const int lane_row = thread / kLanesPerRow, lane_chunk = thread % kLanesPerRow;
    const int offset = Rows::offset(lane_row, lane_chunk);
    constexpr int kElements = 16 / int(sizeof(*data));
    data += lane_row * stride + lane_chunk * kElements;
#pragma unroll
    for (int row = 0; row < kRows; row += kRowsPerPass) {
#pragma unroll
      for (int chunk = 0; chunk < Rows::kChunks; chunk += kLanesPerRow) {
        visit(lane_row + row, lane_chunk + chunk, offset + row * Rows::kRowBytes + chunk * 16,
              data + chunk * kElements);
      }
      data += kRowsPerPass * stride;
      asm volatile("" : "+l"(data));
    }
  }
};

// 16 bytes from global memory; element by element when rows are not 16-byte aligned.
template <class Element>
__device__ __forceinline__ uint4 load_chunk(const Element* source, bool aligned) {
  if (aligned) return *reinterpret_cast<const uint4*>(source);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 4) {
      words[i] = reinterpret_cast<const uint32_t*>(source)[i];
    } else {
      const auto* halves = reinterpret_cast<const uint16_t*>(source);
      words[i] = halves[2 * i] | uint32_t(halves[2 * i + 1]) << 16;
    }
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

// One block of rows of one head into shared memory; rows outside `valid` and channels past
// head_dim arrive as zeros, whatever the memory holds. `source` is the block's first row.
template <class Traits, int kRows>
__device__ __forceinline__ void load_block(typename Traits::Element* target,
                                           const typename Traits::Element* source, int64_t stride,
                                           int row, Range valid, int head_dim) {
  using Copy = BlockCopy<Traits>;
  const uint32_t base = shared_address(target);
  const int begin = valid.begin - row, end = valid.end - row;
  const bool aligned = !Traits::kFeatured || rows_aligned(source, stride);
  constexpr int kElements = 16 / int(sizeof(*source));
  if (aligned && begin <= 0 && end >= kRows && head_dim == Traits::kHeadDim) {
    Copy::template for_each<kRows>(source, stride, [&](int, int, int offset, const auto* from) {
      cp_async_16(base + offset, from, true);
    });
    return;
  }
  Copy::template for_each<kRows>(
      source, stride, [&](int r, int chunk, int offset, const auto* from) {
        const bool in_range = r >= begin && r < end && chunk * kElements < head_dim;
        if (aligned) {
          cp_async_16(base + offset, from, in_range);
        } else {
          const uint4 x = in_range ? load_chunk(from, false) : uint4{};
          store_shared_16(base + offset, {x.x, x.y, x.z, x.w});
        }
      });
}

// Removes NaN and infinities from a block of keys, which dQ = dS K would spread to rows that do
// not see them; poison[key] is a mask that makes the rows that do see them NaN. True if there was
// any.
template <class Traits, int kRows, class Part = typename Traits::Element>
__device__ __forceinline__ bool scrub_keys(typename Traits::Element* keys, uint32_t* poison) {
  using Copy = BlockCopy<Traits>;
  const uint32_t base = shared_address(keys);
  for (int r = threadIdx.x; r < kRows; r += Traits::kThreads) poison[r] = 0;
  __syncthreads();  // the block has arrived, poison is clear
  bool found = false;
  Copy::template for_each<kRows>(keys, 0, [&](int r, int, int offset, const auto*) {
    uint32_t words[4];
    load_shared_16(words, base + offset);
    if (!remove_non_finite<Part>(words)) return;
    store_shared_16(base + offset, words);
    poison[r] = ~0u;
    found = true;
  });
  return __syncthreads_or(found);  // clean keys and their poison are visible
}

// One block of a row statistic; the workspace is padded, so no row is out of range.
template <int kRows>
__device__ __forceinline__ void load_stats(float* target, const float* source) {
  const int i = threadIdx.x * 4;
  if (i < kRows) cp_async_16(shared_address(target + i), source + i, true);
}

// K and V of this CTA's key block.
template <class Traits>
__device__ __forceinline__ void load_keys(typename Traits::Shared& shared,
                                          const BackwardParams& p) {
  using Element = typename Traits::Element;
  const auto& tile = shared.tile;
  const int64_t first = tile.sequence.row_k;
  load_block<Traits, Traits::kBlockKV>(shared.k,
                                       row_of<Element>(p.k, tile.batch, first, tile.head, tile.key),
                                       p.k.row, tile.key, tile.keys, p.head_dim);
  load_block<Traits, Traits::kBlockKV>(shared.v,
                                       row_of<Element>(p.v, tile.batch, first, tile.head, tile.key),
                                       p.v.row, tile.key, tile.keys, p.head_dim_v);
}

// Q and the row statistics of one step, if there is one; closes the group of copies.
template <class Traits>
__device__ __forceinline__ void load_q(typename Traits::Shared& shared, const BackwardParams& p,
                                       const BackwardWorkspace<Traits>& workspace, int step) {
  using Element = typename Traits::Element;
  const auto& tile = shared.tile;
  if (step < tile.steps()) {
    const auto place = tile.step(step);
    const int head = place.head, row = place.row;
    const int stage = step % Traits::kStages;
    load_block<Traits, Traits::kBlockQ>(
        shared.q[stage], row_of<Element>(p.q, tile.batch, tile.sequence.row_q, head, row), p.q.row,
        row, tile.rows, p.head_dim);
    const int64_t at = head * workspace.rows + tile.padded + row;
    load_stats<Traits::kBlockQ>(shared.lse[stage], workspace.lse + at);
    load_stats<Traits::kBlockQ>(shared.delta[stage], workspace.delta + at);
  }
  cp_async_commit();
}

// dO of one step, if there is one; closes the group of copies.
template <class Traits>
__device__ __forceinline__ void load_dout(typename Traits::Shared& shared, const BackwardParams& p,
                                          int step) {
  using Element = typename Traits::Element;
  const auto& tile = shared.tile;
  if (step < tile.steps()) {
    const auto place = tile.step(step);
    const int head = place.head, row = place.row;
    load_block<Traits, Traits::kBlockQ>(
        shared.dout[step % Traits::kStagesDout],
        row_of<Element>(p.dout, tile.batch, tile.sequence.row_q, head, row), p.dout.row, row,
        tile.rows, p.head_dim_v);
  }
  cp_async_commit();
}

}  // namespace flash
