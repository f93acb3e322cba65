// Every compile-time constant of the backward pass: tiles, warps, shared memory, workspace.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/mask.cuh"
#include "common/params.h"
#include "common/swizzle.cuh"
#include "common/workspace_backward.cuh"

namespace flash::v2 {

template <class Traits>
struct BackwardTile;

// kFeatured serves softcap and rows that are not 16-byte aligned.
template <class Instance, bool kIsFeatured = false>
struct BackwardTraits {
  using Element = typename Instance::Element;
  static constexpr bool kFeatured = kIsFeatured;
  static constexpr int kHeadDim = Instance::kHeadDim;
  static constexpr int kBlockQ = 64;
  static constexpr int kBlockKV = kHeadDim <= 64 ? 128 : 64;
  static constexpr int kCtasPerSm = kHeadDim <= 128 ? 2 : 1;  // one hides the other's barriers
  static constexpr int kStages = 2;                           // of Q and its row statistics
  static constexpr int kStagesDout = kHeadDim == 96 || kHeadDim == 128 ? 1 : 2;

  static constexpr bool kDqKernel = true;  // dQ has its own kernel when it must be deterministic

  // A warp owns 32 keys. kSplit warps share them: each takes a slice of the query rows in S and
  // dP, and a slice of the channels in dK and dV, so that the accumulators fit in registers.
  static constexpr int kWarpKeys = 32;
  static constexpr int kKeyWarps = kBlockKV / kWarpKeys;
  static constexpr int kSplit = kHeadDim <= 64 ? 1 : kHeadDim <= 128 ? 2 : 4;
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
    Element ds[2][kBlockKV * kBlockQ];
    Element p[kSplit == 1 ? 8 : kBlockKV * kBlockQ];
    float lse[kStages][kBlockQ];  // at least kBlockKV in all
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

// The work of one CTA of the main kernel: a key block of one KV head, and the query blocks that see
// any of it, for each query head of the group.
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

  // Key blocks of one group of heads after another: the group's Q, dO and dQ stay in L2, and
  // within it the key blocks that causal rows visit most often come first.
  __device__ __forceinline__ static BackwardTile make(const BackwardParams& p, int key_blocks,
                                                      int group) {
    const int all_heads = p.batch * p.heads_kv;
    const int first_head = int(blockIdx.x / (int64_t(key_blocks) * group)) * group;
    const int64_t rest = blockIdx.x - int64_t(first_head) * key_blocks;
    const int heads_here = min(group, all_heads - first_head);
    const int which = first_head + int(rest % heads_here);
    return BackwardTile(p, int(rest / heads_here) * kBlockKV, which % p.heads_kv,
                        which / p.heads_kv);
  }

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

 private:
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

}  // namespace flash::v2
