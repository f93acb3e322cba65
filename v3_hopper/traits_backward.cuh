// Everything about the backward kernels that is known at compile time.
#pragma once

#include "common/dispatch.h"
#include "v3_hopper/ptx.cuh"

namespace flash::v3 {

inline constexpr int kWarpgroup = 128;    // threads that issue a wgmma together
inline constexpr int kChunkColumns = 64;  // 16-bit elements of one 128-byte row
inline constexpr int kGradientRows = 64;  // query rows of one block of dQ, LSE and delta

// Named barriers; 0 is __syncthreads.
enum BackwardEvent : int {
  kScoreGradientStored = 1,
  kKeysRead = 2,
  kWarpgroupDone = 3,
  kProductTurn = 6
};

// Tiles under the 128-byte swizzle start at multiples of 1024 bytes.
template <class Shared>
__device__ __forceinline__ Shared* align_shared(uint8_t* memory) {
  return reinterpret_cast<Shared*>(memory + (-shared_address(memory) & 1023));
}

// One CTA owns 64 keys per consumer warpgroup and meets every block of query rows that sees them.
template <class I, bool kHasSoftcap>
struct BackwardTraits {
  using Element = typename I::Element;
  static constexpr bool kSoftcap = kHasSoftcap;
  static constexpr int kHeadDim = I::kHeadDim;
  static constexpr int kChunks = (kHeadDim + kChunkColumns - 1) / kChunkColumns;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kBlockQ = kGradientRows;
  static constexpr int kKeysPerWarpgroup = 64;
  static constexpr int kBlockKV = kKeysPerWarpgroup * kConsumers;
  static constexpr int kStagesQ = 3;
  static constexpr int kStagesDO = 2;
  static constexpr int kStagesDS = 3;  // read a step later, by a warpgroup half a step behind
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static_assert(registers_fit(kConsumers, kProducerRegisters, kConsumerRegisters));
  static constexpr int kColumnsDQ = kHeadDim / kConsumers;  // of dQ, per warpgroup
  static_assert(kChunks == kConsumers, "each warpgroup's columns begin a chunk of K");

  using TileKV = Element[kChunks][kBlockKV][kChunkColumns];
  using TileQ = Element[kChunks][kBlockQ][kChunkColumns];
  using TileDS = Element[kBlockKV][kBlockQ];  // transposed
  struct Shared {
    alignas(1024) TileKV k, v;
    TileQ q[kStagesQ], dout[kStagesDO];
    float dq[kConsumers][kBlockQ * kColumnsDQ];  // on its way to L2, in accumulator order
    TileDS ds[kStagesDS];
    float lse[kStagesQ][kBlockQ];
    float delta[kStagesDO][kBlockQ];
    int row[kStagesQ];               // first row of the block in the slot
    int suspicious[kStagesDS];       // per slot of dS: a masked score was not finite
    uint32_t poison[kBlockKV / 32];  // a bit for every key that was not finite
    Barrier k_full, v_full, landed;
    Barrier q_full[kStagesQ], q_free[kStagesQ];
    Barrier dout_full[kStagesDO], dout_free[kStagesDO];
    Barrier dq_full[kConsumers], dq_free[kConsumers];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;  // room to align
};

}  // namespace flash::v3
