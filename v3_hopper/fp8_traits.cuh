// The constants of the FP8 kernel: V lies (dv, keys) in shared memory, with rows of ones below it,
// so that P V also gives the row sums. It passes through another place there if it is to be
// transposed.
#pragma once

#include "v3_hopper/traits.cuh"

namespace flash::v3::fp8 {

// The producer's warps: the first one schedules and loads, the others transpose.
inline constexpr int kTransposers = 3;

inline constexpr float kLog2E = 1.4426950408889634f;

// The sizes that were tuned, per head dims: consumers, K/V stages, stages of V as it comes, Q
// stages, columns of P V that are computed at a time.
template <int kHeadDim, int kHeadDimV>
struct Tuning {
  static constexpr int kConsumers = 3, kStages = 4, kStagesRaw = 2, kStagesQ = 2,
                       kPartV = kHeadDimV < 128 ? kHeadDimV : 64;
};
template <>
struct Tuning<64, 64> {
  static constexpr int kConsumers = 4, kStages = 4, kStagesRaw = 2, kStagesQ = 2, kPartV = 64;
};
template <>
struct Tuning<192, 128> {
  static constexpr int kConsumers = 3, kStages = 2, kStagesRaw = 2, kStagesQ = 1, kPartV = 64;
};
template <>
struct Tuning<192, 192> {
  static constexpr int kConsumers = 2, kStages = 2, kStagesRaw = 2, kStagesQ = 1, kPartV = 96;
};
template <>
struct Tuning<256, 256> {
  static constexpr int kConsumers = 2, kStages = 2, kStagesRaw = 2, kStagesQ = 1, kPartV = 64;
};

// What transposing a tile of V takes besides: nothing, a look for NaN, or zeros in place of NaN and
// of rows behind the last key. After the last tile: the end.
enum class Care : int { kNone, kLook, kClean, kEnd };

// The scales of a block of keys, which consumers read with K: of K, of V, and of the V of the block
// before in units of this one's.
struct BlockScales {
  float k, v, v_ratio;
};
inline constexpr int kScalesFetched = 16;  // blocks whose scales are fetched at a time

// What the loading warp tells the transposing warps of a tile of V.
struct Order {
  Care care;
  int keys;  // rows that count
  int work;  // slot of its tile of work
  int v;     // slot of V where it lies, if it comes with contiguous keys
};

// kContiguous: V comes with its keys contiguous. Nothing is transposed then: the warps that would
// only look for NaN where a row must not see a key.
template <class Instance, bool kFeaturedScores, bool kContiguous = false>
struct Traits {
  using Element = e4m3;
  using Output = bf16;
  using Tuned = Tuning<Instance::kHeadDim, Instance::kHeadDimV>;
  static constexpr bool kFeatured = kFeaturedScores;  // softcap, or a scale that is not positive
  static constexpr bool kKeysContiguous = kContiguous;
  static constexpr int kHeadDim = Instance::kHeadDim;
  static constexpr int kHeadDimV = Instance::kHeadDimV;
  // Four consumers leave no registers for features.
  static constexpr int kConsumers = kFeatured && Tuned::kConsumers > 3 ? 3 : Tuned::kConsumers;
  static constexpr int kBlockQ = kConsumers * kGroupRows;
  static constexpr int kBlockKV = 128;
  static constexpr int kStages = Tuned::kStages;
  static constexpr int kStagesRaw = Tuned::kStagesRaw;
  static constexpr int kStagesQ = Tuned::kStagesQ;
  static constexpr bool kFolds = false;
  static constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
  static constexpr bool kLean = kConsumers > 3;  // a consumer has few registers
  static constexpr int kProducerRegisters = kConsumers > 2 ? 32 : 40;
  static constexpr int kConsumerRegisters = kLean ? 112 : kConsumers == 3 ? 160 : 232;
  static_assert(registers_fit(kConsumers, kProducerRegisters, kConsumerRegisters));

  // P V is computed kPartV columns at a time, and the last part has 8 more for the row sums.
  static constexpr int kPartV = Tuned::kPartV;
  static constexpr int kPartsV = kHeadDimV / kPartV;
  static constexpr int kSumColumns = 8;
  static_assert(kHeadDimV % kPartV == 0);

  // Columns of Q, K and V are one byte each.
  static constexpr int kChunks = (kHeadDim + kChunkBytes - 1) / kChunkBytes;
  static constexpr int kChunksV = (kHeadDimV + kChunkBytes - 1) / kChunkBytes;
  static constexpr int kBytesQ = kGroupRows * kChunks * kChunkBytes;  // of one consumer
  static constexpr int kBytesK = kBlockKV * kChunks * kChunkBytes;
  static constexpr int kBytesRaw = kBlockKV * kChunksV * kChunkBytes;
  static constexpr int kBytesV = (kHeadDimV + kSumColumns) * kChunkBytes;  // dv rows of 128 keys
  static_assert(kBlockKV == kChunkBytes, "a transposed tile is one chunk wide");
  static constexpr int kChunkColumns = kChunkBytes / int(sizeof(Output));  // of O
  static constexpr int kStagedO = kHeadDimV / kChunkColumns;
  // O leaves through a slot of V, or through the memory where V would be transposed from.
  static constexpr bool kStagesO = kConsumers == 2;
  static_assert(!kStagesO || kConsumers * kStagedO * kGroupRows <= kStagesRaw * kBytesRaw / 128);
  // At 256 the consumers overlap better without an order once nothing is transposed beside them.
  static constexpr bool kTakesTurns = !kKeysContiguous || kHeadDim < 256;
  static constexpr int kWorkSlots = 4;

  struct Shared {
    alignas(1024) unsigned char q[kStagesQ][kConsumers][kBytesQ];
    alignas(1024) unsigned char k[kStages][kBytesK];
    alignas(1024) unsigned char raw[kStagesRaw][kBytesRaw];  // V (keys, dv)
    alignas(1024) unsigned char v[kStages][kBytesV];         // V (dv, keys), and the ones
    BlockScales scales[kStages];
    BlockScales fetched[kScalesFetched];  // of the next blocks
    float units[kConsumers];              // the last scale of V of a consumer's tile
    Order orders[kStagesRaw];
    Work work[kWorkSlots];
    // What takes Q K^T to logarithms, but for the scale of K. It is there when Q and a K are.
    float to_log2[kWorkSlots][kConsumers];
    PackedWalk walk;
    Barrier work_full[kWorkSlots], work_empty[kWorkSlots];
    Barrier q_full[kStagesQ][kConsumers], q_empty[kStagesQ][kConsumers];
    Barrier k_full[kStages], k_empty[kStages];
    Barrier raw_full[kStagesRaw], raw_empty[kStagesRaw];
    Barrier v_full[kStages], v_empty[kStages];
    int last_block[kConsumers];  // that a lean consumer visits: it has few registers
  };
};

// A position in several rings at once: how many slots have been passed. Fewer registers than one
// Ring each.
struct Counter {
  unsigned passed = 0;

  template <int kSlots>
  __device__ __forceinline__ int slot() const {
    static_assert((kSlots & (kSlots - 1)) == 0);
    return passed % kSlots;
  }
  template <int kSlots>
  __device__ __forceinline__ uint32_t parity() const {
    return passed / kSlots % 2;
  }
};

inline constexpr int kScaleRows = 128;  // that share one, where not all do

// The factor of what is stored in a row of Q, K or V; `sequence` counts also packed sequences.
__device__ __forceinline__ float descale_of(const Descale& d, int sequence, int row, int head) {
  if (d.data == nullptr) return 1.0f;
  const int block = d.rows > 0 ? row / kScaleRows : 0;
  return d.data[sequence * d.batch + block * d.block + head * d.head];
}

}  // namespace flash::v3::fp8
