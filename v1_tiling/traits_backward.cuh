// Every compile-time constant of the backward pass: tiles, warps, shared memory, workspace.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dispatch.h"
#include "common/mask.cuh"
#include "common/params.h"
#include "common/swizzle.cuh"
#include "common/workspace_backward.cuh"

namespace flash::v1 {

template <class Traits>
struct BackwardTile;

// kFeatured serves softcap and rows that are not 16-byte aligned.
// kSmall fits the 64 KB of shared memory that Turing has.
template <class Instance, bool kIsFeatured = false, bool kSmall = false>
struct BackwardTraits {
  using Element = typename Instance::Element;
  static constexpr bool kFeatured = kIsFeatured;
  static constexpr int kHeadDim = Instance::kHeadDim;
  static constexpr int kBlockQ = 64;
  static constexpr int kBlockKV = (kHeadDim <= 64 ? 128 : 64) / (kSmall ? 2 : 1);
  static constexpr int kCtasPerSm = kSmall ? 1 : 2;  // one hides the other's barriers
  static constexpr int kStages = kSmall ? 1 : 2;     // of Q, its row statistics, and dS
  static constexpr int kStagesDout = kSmall || kHeadDim > 64 ? 1 : 2;
  static constexpr bool kDqKernel = false;  // dQ is always summed in memory

  // A warp owns 32 keys. kSplit warps share them: each takes a slice of the query rows in S and
  // dP, and a slice of the channels in dK and dV, so that the accumulators fit in registers.
  static constexpr int kWarpKeys = 32;
  static constexpr int kKeyWarps = kBlockKV / kWarpKeys;
  static constexpr int kSplit = (kHeadDim <= 64 ? 1 : 2) * (kSmall ? 2 : 1);
  static constexpr int kWarps = kKeyWarps * kSplit;
  static constexpr int kThreads = kWarps * 32;
  // Rows between two updates of dK and dV; softcap needs registers for its derivative.
  static constexpr int kStepQ = kSplit > 1 ? kBlockQ : kFeatured ? 16 : 32;
  static constexpr int kWarpQ = kStepQ / kSplit;
  static constexpr int kWarpDim = kHeadDim / kSplit;
  static constexpr int kScoreTiles = kWarpKeys / 16 * (kWarpQ / 8);  // of 16 x 8, of a warp

  // dQ is split over the warps as rows times channels.
  static constexpr int kDqWarpsQ = 2;
  static constexpr int kDqRows = kBlockQ / kDqWarpsQ;
  static constexpr int kDqWarpsDim = kWarps / kDqWarpsQ;
  static constexpr int kDqDim = kHeadDim / kDqWarpsDim;
  // A pass of at most 32 columns at a time: its sums leave while the next one multiplies.
  static constexpr int kDqPasses = kDqDim / 32 > 1 ? kDqDim / 32 : 1;
  static constexpr int kDqPassDim = kDqDim / kDqPasses;
  static constexpr int kDqTiles = kDqRows / 16 * (kDqPassDim / 8);
  // The sums of the last pass leave behind the next step's first product, if registers allow.
  static constexpr bool kLateDq = kHeadDim > 128;
  static_assert(kWarpQ % 16 == 0 && kWarpDim % 16 == 0 && kDqRows % 16 == 0 &&
                kDqPassDim % 16 == 0);

  // Before sm_80 no matrix instruction takes bf16: there these kernels are empty.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr bool kRuns = std::is_same_v<Element, fp16>;
#else
  static constexpr bool kRuns = true;
#endif

  using Rows = SwizzledRows<kHeadDim>;   // Q, dO, K, V
  using Scores = SwizzledRows<kBlockQ>;  // P and dS, transposed: (kBlockKV, kBlockQ)

  struct Shared {
    alignas(128) Element k[kBlockKV * kHeadDim];
    Element v[kBlockKV * kHeadDim];
    Element q[kStages][kBlockQ * kHeadDim];
    Element dout[kStagesDout][kBlockQ * kHeadDim];
    Element ds[kStages][kBlockKV * kBlockQ];
    Element p[kSplit == 1 ? 8 : kBlockKV * kBlockQ];
    float lse[kStages][kBlockQ];
    float delta[kStages][kBlockQ];
    BackwardTile<BackwardTraits> tile;  // not in registers, which the accumulators need
    uint32_t poison[kBlockKV];          // all ones for a key that was not finite, else 0
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

// The work of one CTA on one key block of one KV head: the query blocks that see any of it, for
// each query head of the group.
template <class Traits>
struct BackwardTile {
  static constexpr int kBlockQ = Traits::kBlockQ, kBlockKV = Traits::kBlockKV;

  int key, head, batch;
  Sequence sequence;
  Range keys;      // keys that any row sees
  Range rows;      // rows that see any key of this block
  Range blocks;    // query blocks that hold them
  Range plain;     // first rows of query blocks in which every row sees every key of this block
  int heads;       // query heads that share the KV head
  int64_t padded;  // first row of the sequence in the workspace

  __device__ __forceinline__ int steps() const {
    return blocks.begin < blocks.end ? heads * (blocks.end - blocks.begin) : 0;
  }
  __device__ __forceinline__ bool all_plain() const {
    return plain.begin <= blocks.begin * kBlockQ && (blocks.end - 1) * kBlockQ < plain.end;
  }

  // The query head of a step, and the first row of its query block.
  struct Step {
    int head, row;
  };
  __device__ __forceinline__ Step step(int i) const {
    const int n = blocks.end - blocks.begin, turn = heads == 1 ? 0 : i / n;
    return {head * heads + turn, (blocks.begin + i - turn * n) * kBlockQ};
  }

  __device__ __forceinline__ BackwardTile(const BackwardParams& p, int key, int head, int batch)
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
  }
};

}  // namespace flash::v1
