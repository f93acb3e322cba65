// Every compile-time constant of a kernel: tile sizes, pipeline depths, registers, shared memory.
#pragma once

#include "common/mask.cuh"
#include "v3_hopper/tma.cuh"

namespace flash::v3 {

inline constexpr int kWarp = 32;
inline constexpr int kGroupThreads = 128;
inline constexpr int kGroupWarps = kGroupThreads / kWarp;
inline constexpr int kGroupRows = 64;  // query rows of one consumer warpgroup

// The warps of the producer warpgroup, by their job.
enum Role : int { kLoads = 0, kSchedules = 1, kGuards = 2 };
inline constexpr int kGuardWarps = 2;

// The sizes that were tuned, per head dim: consumers, keys of a tile (featured scores take more
// registers: fewer keys then), K/V stages, Q stages, chunks of O that are staged at a time.
// kLong: for sequences of kLongRows and more.
template <int kHeadDim, int kHeadDimV, bool kLong = false>
struct Tuning {
  static constexpr int kConsumers = 2, kBlockKV = 128, kFewer = 0, kStages = 2, kStagesQ = 2,
                       kStagedO = 2;
};
template <>
struct Tuning<64, 64> {
  static constexpr int kConsumers = 3, kBlockKV = 128, kFewer = 16, kStages = 4, kStagesQ = 2,
                       kStagedO = 1;
};
template <>
struct Tuning<96, 96, true> {
  static constexpr int kConsumers = 3, kBlockKV = 96, kFewer = 0, kStages = 2, kStagesQ = 2,
                       kStagedO = 1;
};
template <>
struct Tuning<128, 128, true> {
  static constexpr int kConsumers = 3, kBlockKV = 64, kFewer = 0, kStages = 3, kStagesQ = 2,
                       kStagedO = 1;
};
template <>
struct Tuning<192, 128> {
  static constexpr int kConsumers = 2, kBlockKV = 128, kFewer = 32, kStages = 2, kStagesQ = 1,
                       kStagedO = 1;
};
template <>
struct Tuning<192, 192> {
  static constexpr int kConsumers = 2, kBlockKV = 64, kFewer = 0, kStages = 3, kStagesQ = 1,
                       kStagedO = 2;
};
template <>
struct Tuning<256, 256> {
  static constexpr int kConsumers = 2, kBlockKV = 64, kFewer = 0, kStages = 2, kStagesQ = 1,
                       kStagedO = 2;
};

// Three warpgroups and few keys a block: more rows for the same K/V and a shorter chain per block,
// but short sequences fill such tiles badly.
template <int kHeadDim, int kHeadDimV>
inline constexpr bool kHasLong = false;
template <>
inline constexpr bool kHasLong<96, 96> = true;
template <>
inline constexpr bool kHasLong<128, 128> = true;
inline constexpr int kLongRows = 8192;
inline constexpr int kLongRowsFull = 2048;               // the same where nothing is masked
inline constexpr int64_t kLongRowsOfAllHeads = 1 << 18;  // fewer would leave CTAs idle

// One tile of work, written by the scheduling warp and read by everyone else.
struct Work {
  Sequence sequence;
  int index;          // of the sequence
  int batch;          // of the tensors: 0 when packed
  int head, head_kv;  // head < 0: no more work
  int row;            // first query row, in its sequence
  Range unguarded;    // blocks of V (see unguarded_blocks)
  int poisoned;       // a guard replaced NaN or Inf in V by zero
};

// How far the walk through packed sequences has come. It lies in shared memory because the
// scheduling warp has few registers.
struct PackedWalk {
  int first;   // first sequence of the 32 that are looked at
  int before;  // tiles of all sequences before it
  int sorted;  // the 32 sequences from this one on are in order of length:
  unsigned char order[kWarp];
};

// Named barriers; 0 is __syncthreads.
enum NamedBarrier : int {
  kTurn = 1,    // kTurn + consumer: its turn to issue GEMMs
  kDone = 5,    // kDone + consumer: a meeting of its threads
  kStaged = 9,  // kStaged + consumer: its rows of O are in shared memory
};

template <class Instance, bool kFeaturedScores, bool kLong = false>
struct Traits {
  using Element = typename Instance::Element;
  using Output = Element;
  using Tuned = Tuning<Instance::kHeadDim, Instance::kHeadDimV, kLong>;
  static constexpr bool kFeatured = kFeaturedScores;  // softcap, or a scale that is not positive
  static constexpr bool kKeysContiguous = false;      // of V: in FP8
  static constexpr int kHeadDim = Instance::kHeadDim;
  static constexpr int kHeadDimV = Instance::kHeadDimV;
  static constexpr int kConsumers = Tuned::kConsumers;
  static constexpr int kBlockQ = kConsumers * kGroupRows;
  static constexpr int kBlockKV = Tuned::kBlockKV - (kFeatured ? Tuned::kFewer : 0);
  static constexpr int kStages = Tuned::kStages;
  static constexpr int kStagesQ = Tuned::kStagesQ;
  static constexpr bool kTakesTurns = kConsumers == 2;
  // Blocks that a consumer's rows do not see; with turns, change_tile alone keeps them in step.
  static constexpr bool kSkips = (!kTakesTurns || kStagesQ == 1) && kBlockQ > kBlockKV;
  static constexpr bool kFolds = kTakesTurns;  // three warpgroups' tiles gain nothing by it
  static constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  static_assert(registers_fit(kConsumers, kProducerRegisters, kConsumerRegisters));

  // In shared memory a tile is a row of chunks, each 128 bytes wide; TMA fills columns beyond the
  // head dim with zeros.
  static constexpr int kChunkColumns = kChunkBytes / int(sizeof(Element));
  static constexpr int kChunks = (kHeadDim + kChunkColumns - 1) / kChunkColumns;
  static constexpr int kChunksV = (kHeadDimV + kChunkColumns - 1) / kChunkColumns;
  static constexpr int kBytesQ = kGroupRows * kChunks * kChunkBytes;  // of one consumer
  static constexpr int kBytesK = kBlockKV * kChunks * kChunkBytes;
  static constexpr int kBytesV = kBlockKV * kChunksV * kChunkBytes;
  static constexpr int kStagedO = Tuned::kStagedO;  // chunks of O that have room in shared memory
  static constexpr bool kStagesO = kStagedO > 0;
  static constexpr int kBytesO = kGroupRows * kStagedO * kChunkBytes;
  static constexpr int kWorkSlots = 4;
  static constexpr int kWorkReaders = kConsumers + kGuardWarps + 1;  // arrivals that free a slot

  struct Shared {
    alignas(1024) unsigned char q[kStagesQ][kConsumers][kBytesQ];
    alignas(1024) unsigned char o[kStagesO ? kConsumers : 1][kStagesO ? kBytesO : 16];
    alignas(1024) unsigned char k[kStages][kBytesK];
    alignas(1024) unsigned char v[kStages][kBytesV];
    Work work[kWorkSlots];
    PackedWalk walk;
    Barrier work_full[kWorkSlots], work_empty[kWorkSlots];
    Barrier q_full[kStagesQ][kConsumers], q_empty[kStagesQ][kConsumers];
    Barrier k_full[kStages], k_empty[kStages];
    Barrier v_landed[kStages];  // V arrived, but a guard has to look through it first
    Barrier v_full[kStages], v_empty[kStages];
  };
};

// Where sequences are this long, tiles last, so that none is claimed before the last but one is
// done: whoever claims early may end late. Short tiles are claimed early, for a claim takes time.
inline constexpr int kLateClaimRows = 1024;

struct ScheduleParams {
  int tiles_q;            // query tiles of the longest sequence
  int folded_heads;       // query heads whose tiles come in pairs; behind them:
  int heads_per_section;  // query heads whose tiles are interleaved, so that their K/V stay in L2
  int* claimed;           // tiles that CTAs have claimed beyond their first; null: no claims
};

struct Arguments {
  CUtensorMap q, k, v, o;
  ForwardParams p;
  ScheduleParams schedule;
};

}  // namespace flash::v3
