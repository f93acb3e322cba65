// Backward: blocks of query rows on their way to shared memory, between the products of dQ.
#pragma once

#include "common/load_backward.cuh"
#include "common/scores_backward.cuh"
#include "v2_parallel/traits_backward.cuh"

namespace flash::v2 {

// A block of query rows, copied a part at a time.
template <class Traits>
struct RowsCopy {
  using Element = typename Traits::Element;
  using Copy = flash::BlockCopy<Traits>;
  static constexpr int kPerRow = Copy::Rows::kChunks / Copy::kLanesPerRow;  // chunks of a thread
  static constexpr int kChunks = Traits::kBlockQ / Copy::kRowsPerPass * kPerRow;

  const Element* from;
  int64_t stride;
  uint32_t to;
  bool whole;  // else all was copied at once, or there is nothing to copy

  // `source` is row 0; `row` the block's first, negative if there is no block.
  __device__ __forceinline__ void begin(Element* target, const Element* source, int64_t row_stride,
                                        int row, Range valid, int head_dim) {
    stride = row_stride;
    whole = row >= valid.begin && row + Traits::kBlockQ <= valid.end &&
            head_dim == Traits::kHeadDim && (!Traits::kFeatured || rows_aligned(source, stride));
    if (!whole && row >= 0) {
      load_block<Traits, Traits::kBlockQ>(target, source + row * stride, stride, row, valid,
                                          head_dim);
    }
    const int thread = opaque(int(threadIdx.x));
    const int lane_row = thread / Copy::kLanesPerRow, lane_chunk = thread % Copy::kLanesPerRow;
    from = source + (row + lane_row) * stride + lane_chunk * 8;
    to = shared_address(target) + Copy::Rows::offset(lane_row, lane_chunk);
  }

  // Part i of n.
  __device__ __forceinline__ void part(int i, int n) const {
#pragma unroll
    for (int c = i * kChunks / n; c < (i + 1) * kChunks / n; ++c) {
      const int row = c / kPerRow * Copy::kRowsPerPass, chunk = c % kPerRow * Copy::kLanesPerRow;
      cp_async_16_if(whole, to + row * Copy::Rows::kRowBytes + chunk * 16,
                     from + row * stride + chunk * 8);
    }
  }
};

// dO and then Q of later steps, in kDqSlots parts; each is a group of copies of its own.
template <class Traits>
struct LaterRows {
  static constexpr int kSlots = Traits::kDqSlots, kHalf = kSlots / 2;

  typename Traits::Shared& shared;
  const BackwardParams& p;
  const BackwardWorkspace<Traits>& workspace;
  int step;  // that has just freed its places
  RowsCopy<Traits> rows;

  __device__ __forceinline__ LaterRows(typename Traits::Shared& shared, const BackwardParams& p,
                                       const BackwardWorkspace<Traits>& workspace, int step)
      : shared(shared), p(p), workspace(workspace), step(step) {}

  __device__ __forceinline__ void copy(int slot) {
    if (slot == 0) begin_dout(step + Traits::kStagesDout);
    if (slot == kHalf) begin_q(step + Traits::kStages);
    if (slot % kHalf < Traits::kCopyParts) rows.part(slot % kHalf, Traits::kCopyParts);
    if (slot % kHalf == kHalf - 1) cp_async_commit();
  }
  __device__ __forceinline__ void copy_all() {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) copy(slot);
  }

 private:
  __device__ __forceinline__ void begin_q(int next) {
    const auto& tile = shared.tile;
    const auto [head, row, turn] = tile.step(next);
    const int stage = next % Traits::kStages;
    const bool present = next < tile.steps();
    rows.begin(shared.q[stage], tile.q + turn * p.q.head, p.q.row, present ? row : -1, tile.rows,
               p.head_dim);
    if (!present) return;
    const int64_t at = head * workspace.rows + tile.padded + row;
    load_stats<Traits::kBlockQ>(shared.lse[stage], workspace.lse + at);
    load_stats<Traits::kBlockQ>(shared.delta[stage], workspace.delta + at);
  }
  __device__ __forceinline__ void begin_dout(int next) {
    const auto& tile = shared.tile;
    const auto [head, row, turn] = tile.step(next);
    rows.begin(shared.dout[next % Traits::kStagesDout], tile.dout + turn * p.dout.head, p.dout.row,
               next < tile.steps() ? row : -1, tile.rows, p.head_dim_v);
  }
};

// Fragments of P^T or dS^T to shared memory, where other warps read them; `place` is this lane's
// place in the block for ldmatrix, and for its inverse.
template <class Traits>
__device__ __forceinline__ void store_fragments(typename Traits::Element* block, uint32_t place,
                                                const uint32_t (&r)[2][Traits::kWarpQ / 16][4],
                                                int row) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using Scores = typename Traits::Scores;
  const uint32_t target = shared_address(block) + place;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kWarpQ / 16; ++n) {
      stmatrix_x4(Scores::advance(target, row / 8 + n * 2) + m * 16 * Scores::kRowBytes, r[m][n]);
    }
  }
#else
  const WarpPlace<Traits> warp;
  store_scores<Traits>(block, r, warp.key, row, warp.lane);
#endif
}

}  // namespace flash::v2
