// Every compile-time constant of the backward pass: tiles, warps, shared memory, workspace.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/gemm_backward.cuh"
#include "common/load_backward.cuh"
#include "common/mask.cuh"
#include "common/params.h"
#include "common/store_backward.cuh"
#include "common/swizzle.cuh"
#include "common/workspace_backward.cuh"

namespace flash::v2 {

template <class Traits>
struct BackwardTile;

// A thread's part of the addresses in one step, kept in shared memory: registers would spill.
struct alignas(16) ScorePlace {
  uint32_t keys, queries;  // fragments of K and V, of Q and dO, for S and dP
  uint32_t stats;          // its rows among the row statistics
  uint32_t scores;         // fragments of P and dS
};
struct alignas(16) DqPlace {
  uint32_t scores, channels;  // fragments of dS and K, for dQ
  uint32_t sums;              // its elements in a block of dQ
  uint32_t rows;              // fragments of Q and dO, for dK and dV
};

// kFeatured serves softcap and rows that are not 16-byte aligned, and every call where shared
// memory has no room for other tiles: its own are small. kShort serves calls whose CTAs make few
// steps: two of half the keys then hide each other's start and end.
template <class Instance, bool kIsFeatured = false, bool kIsShort = false>
struct BackwardTraits {
  using Element = typename Instance::Element;
  static constexpr bool kFeatured = kIsFeatured;
  static constexpr bool kSmall = kIsFeatured || kIsShort;
  static constexpr int kHeadDim = Instance::kHeadDim;
  static constexpr int kBlockQ = 64;
  static constexpr int kBlockKV = kHeadDim == 64 || (kHeadDim == 128 && !kSmall) ? 128 : 64;
  // Two hide each other's waits.
  static constexpr int kCtasPerSm = kHeadDim <= 96 || (kHeadDim == 128 && kSmall) ? 2 : 1;
  static constexpr int kStages = 2;  // of Q and its row statistics
  static constexpr int kStagesDout = kHeadDim == 96 || (kSmall && kHeadDim < 256) ? 1 : 2;
  // One for each stage of Q; dQ's kernel keeps V's second stage there if dO has one.
  static constexpr int kPlacesDs = kStagesDout == 1 && kHeadDim > 2 * kBlockKV ? 3 : 2;

  static constexpr bool kDqKernel = true;  // dQ has its own kernel when it must be deterministic

  // A warp owns 32 keys. kSplit warps share them: each takes a slice of the query rows in S and
  // dP, and a slice of the channels in dK and dV, so that the accumulators fit in registers.
  static constexpr int kWarpKeys = 32;
  static constexpr int kKeyWarps = kBlockKV / kWarpKeys;
  static constexpr int kSplit = kHeadDim <= 64 ? 1 : kHeadDim <= 128 ? 2 : 4;
  static constexpr int kWarps = kKeyWarps * kSplit;
  static constexpr int kThreads = kWarps * 32;
  // Rows between two updates of dK and dV; softcap needs registers for its derivative.
  static constexpr int kStepQ = kSplit == 1                    ? (kFeatured ? 16 : 32)
                                : kFeatured && kHeadDim <= 128 ? 32
                                                               : kBlockQ;
  static constexpr int kWarpQ = kStepQ / kSplit;
  static constexpr int kWarpDim = kHeadDim / kSplit;
  static constexpr int kScoreTiles = kWarpKeys / 16 * (kWarpQ / 8);  // of 16 x 8, of a warp

  // dQ is split over the warps as rows times channels.
  static constexpr int kDqWarpsQ = 2;
  static constexpr int kDqRows = kBlockQ / kDqWarpsQ;
  static constexpr int kDqWarpsDim = kWarps / kDqWarpsQ;
  static constexpr int kDqDim = kHeadDim / kDqWarpsDim;
  // A pass of at most 32 columns at a time: its sums leave between the next one's products, those
  // of the last pass between the products of the next step's S, if registers allow.
  static constexpr bool kLateDq = kHeadDim > 64 && !kFeatured;
  static constexpr int kDqPasses = kDqDim / 32 > 1 ? kDqDim / 32 : 1;
  static constexpr int kDqPassDim = kDqDim / kDqPasses;
  static constexpr int kDqTiles = kDqRows / 16 * (kDqPassDim / 8);
  // Between the products of dQ, Q and dO of later steps are copied; one part each: at once.
  static constexpr int kDqSlots = kDqPasses * (kBlockKV / 16);
  static constexpr int kCopyParts = kFeatured || kHeadDim <= 64 ? 1 : kDqSlots / 2;
  static_assert(kStages * kBlockQ >= kBlockKV, "dQ's kernel keeps the statistics of kBlockKV rows");
  static_assert(kWarpQ % 16 == 0 && kWarpDim % 16 == 0 && kDqRows % 16 == 0 &&
                kDqPassDim % 16 == 0);

  using Rows = SwizzledRows<kHeadDim>;   // Q, dO, K, V
  using Scores = SwizzledRows<kBlockQ>;  // P and dS, transposed: (kBlockKV, kBlockQ)

  struct Shared {
    alignas(128) Element k[kBlockKV * kHeadDim];
    Element v[kBlockKV * kHeadDim];
    Element q[kStages][kBlockQ * kHeadDim];
    Element dout[kStagesDout][kBlockQ * kHeadDim];
    Element ds[kPlacesDs][kBlockKV * kBlockQ];
    Element p[kSplit == 1 ? 8 : kBlockKV * kBlockQ];
    float lse[kStages][kBlockQ];  // at least kBlockKV in all
    float delta[kStages][kBlockQ];
    BackwardTile<BackwardTraits> tile;  // not in registers, which the accumulators need
    uint32_t poison[kBlockKV];          // all ones for a key that was not finite, else 0
    ScorePlace score_places[kThreads];
    DqPlace dq_places[kThreads];
  };
};

// What this warp owns of a block: computed from the thread number wherever it is asked for.
template <class Traits>
struct WarpPlace {
  int lane, index;
  int key, slice;        // its first key, its slice of the rows of S and the channels of dK and dV
  int dq_row, dq_slice;  // and of dQ

  __device__ __forceinline__ WarpPlace() {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // not the number that the compiler knows already
    lane = thread % 32, index = thread / 32;
    key = index / Traits::kSplit * Traits::kWarpKeys, slice = index % Traits::kSplit;
    dq_row = index % Traits::kDqWarpsQ * Traits::kDqRows, dq_slice = index / Traits::kDqWarpsQ;
  }
};

// Fills in the places of this thread.
template <class Traits>
__device__ __forceinline__ void set_places(typename Traits::Shared& shared) {
  using Rows = typename Traits::Rows;
  using Scores = typename Traits::Scores;
  const WarpPlace<Traits> warp;
  const uint32_t by_rows = lane_rows<Rows>(warp.lane);
  const int row = warp.slice * Traits::kWarpQ;
  shared.score_places[threadIdx.x] = {
      warp.key * Rows::kRowBytes + by_rows,
      row * Rows::kRowBytes + lane_columns<Rows>(warp.lane),
      uint32_t(row + warp.lane % 4 * 2),
      warp.key * Scores::kRowBytes + lane_rows<Scores>(warp.lane),
  };
  shared.dq_places[threadIdx.x] = {
      Scores::advance(lane_columns<Scores>(warp.lane), warp.dq_row / 8),
      Rows::advance(by_rows, warp.dq_slice * 2),
      uint32_t(warp.dq_row * Traits::kHeadDim + warp.dq_slice * 256) + fragment_offset(warp.lane),
      Rows::advance(by_rows, warp.slice * 2),
  };
}

// The work of one CTA of the main kernel: a key block of one KV head, and the query blocks that see
// any of it, for each query head of the group.
template <class Traits>
struct BackwardTile {
  static constexpr int kBlockQ = Traits::kBlockQ, kBlockKV = Traits::kBlockKV;
  using Element = typename Traits::Element;

  int key, head, batch;
  Sequence sequence;
  Range keys;         // keys that any row sees
  Range rows;         // rows that see any key of this block
  Range blocks;       // query blocks that hold them
  Range plain;        // first rows of query blocks in which every row sees every key of this block
  int heads;          // query heads that share the KV head
  int64_t padded;     // first row of the sequence in the workspace
  uint32_t per_step;  // 2^32 / query blocks
  const Element* q;   // row 0 of the first of the query heads
  const Element* dout;
  float* dq;  // block 0 of its sums

  // Key blocks of one group of heads after another: the group's Q, dO and dQ stay in L2, and
  // within it the key blocks that causal rows visit most often come first.
  __device__ __forceinline__ static BackwardTile make(const BackwardParams& p,
                                                      const BackwardWorkspace<Traits>& workspace,
                                                      int key_blocks, int group) {
    const int all_heads = p.batch * p.heads_kv;
    const int first_head = int(blockIdx.x / (int64_t(key_blocks) * group)) * group;
    const int64_t rest = blockIdx.x - int64_t(first_head) * key_blocks;
    const int heads_here = min(group, all_heads - first_head);
    const int which = first_head + int(rest % heads_here);
    return BackwardTile(p, workspace, int(rest / heads_here) * kBlockKV, which % p.heads_kv,
                        which / p.heads_kv);
  }

  __device__ __forceinline__ int steps() const {
    return blocks.begin < blocks.end ? heads * (blocks.end - blocks.begin) : 0;
  }
  __device__ __forceinline__ bool all_plain() const {
    return plain.begin <= blocks.begin * kBlockQ && (blocks.end - 1) * kBlockQ < plain.end;
  }

  // The query head of a step, the first row of its query block, and which head of the group it is.
  struct Step {
    int head, row, turn;
  };
  __device__ __forceinline__ Step step(int i) const {
    const int n = blocks.end - blocks.begin;
    int turn = __umulhi(i, per_step);
    if (i - turn * n >= n) ++turn;
    return {head * heads + turn, (blocks.begin + i - turn * n) * kBlockQ, turn};
  }

 private:
  __device__ __forceinline__ BackwardTile(const BackwardParams& p,
                                          const BackwardWorkspace<Traits>& workspace, int key,
                                          int head, int batch)
      : key(key),
        head(head),
        batch(batch),
        sequence(p, batch),
        keys(sequence.keys(0, sequence.seqlen_q)),
        rows(sequence.rows(key, kBlockKV)),
        blocks{rows.begin / kBlockQ,
               rows.begin < rows.end ? (rows.end + kBlockQ - 1) / kBlockQ : 0},
        plain{max(0, key + kBlockKV - 1 - sequence.last), key - sequence.first - kBlockQ + 2},
        heads(p.heads_q / p.heads_kv),
        padded(BackwardWorkspace<Traits>::first_row(p, batch, sequence.row_q)) {
    if (key + kBlockKV > sequence.seqlen_k) plain = {0, 0};
    per_step = ~0u / max(1, blocks.end - blocks.begin);
    q = row_of<Element>(p.q, batch, sequence.row_q, head * heads, 0);
    dq = workspace.dq + (int64_t(head) * heads * workspace.rows + padded) * Traits::kHeadDim;
    dout = row_of<Element>(p.dout, batch, sequence.row_q, head * heads, 0);
  }
};

}  // namespace flash::v2
