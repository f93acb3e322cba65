// Every compile-time choice of the forward pass: tiles, warps, stages and shared memory.
#pragma once

#include "common/dispatch.h"
#include "common/ptx.cuh"
#include "common/swizzle.cuh"

namespace flash::v2 {

// kFeatured serves softcap, scales that are not positive, and rows that are not 16-byte aligned.
// Its tiles are small: where shared memory has no room for the others, it serves every call.
template <class Instance, bool kIsFeatured>
struct ForwardTraits {
  using Element = typename Instance::Element;
  static constexpr bool kFeatured = kIsFeatured;
  static constexpr int kHeadDim = Instance::kHeadDim;
  static constexpr int kHeadDimV = Instance::kHeadDimV;
  static_assert(kHeadDimV <= kHeadDim, "O is staged where Q was");

  // A warp owns whole rows of Q, S, P and O. More rows per warp read each fragment of K and V from
  // shared memory for more work; registers set the limit. Past 128 columns O is too wide for one
  // warp: a team of two owns the rows, each with half the keys of S and half the columns of O.
  static constexpr int kTeam = kHeadDim <= 128 ? 1 : 2;
  static constexpr bool kWide = kTeam > 1;
  static constexpr int kWarps = kWide && !kFeatured ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowsPerWarp = 32;
  static constexpr int kBlockQ = kWarps / kTeam * kRowsPerWarp;
  static constexpr int kBlockKV = kFeatured                 ? (kHeadDim <= 64 ? 64 : 32)
                                  : kHeadDim <= 64 || kWide ? 128
                                                            : 64;
  // Blocks of K and V in the ring. A wide block has one stage for K and one for V, each filled
  // again as soon as every warp has read it.
  static constexpr int kStages = kWide ? 1 : 2;
  static constexpr int kCtasPerSm = 8 / kWarps;  // 8 warps: all registers, 255 each
  // One CTA per SM takes tile after tile, and starts the copies of the next before it ends this
  // one.
  static constexpr bool kPersistent = kWide && !kFeatured;
  // What every warp knows about its tile lies in shared memory where registers are short.
  static constexpr bool kSharedTile = kWide || (kFeatured && kHeadDim == 128);
  // A warp that sees only the first half of a block's keys forms only that half of S and P.
  static constexpr bool kHalves = kPersistent;

  // Measured on one H200 (README): how many products ahead fragments of K and V are fetched,
  // whether those of Q are as soon as they can be, and over how many products a copy is spread.
  static constexpr int kAhead = kHeadDim > 64 ? 1 : 2;
  static constexpr bool kEarlyQ = kWide;
  static constexpr int kCopyParts = kPersistent     ? 4
                                    : kWide         ? 8
                                    : kHeadDim > 96 ? kHeadDim / 16 * kBlockKV / 16
                                                    : 1;

  using QueryRows = SwizzledRows<kHeadDim>;
  using KeyRows = SwizzledRows<kHeadDim>;
  using ValueRows = SwizzledRows<kHeadDimV>;
  using WeightRows = SwizzledRows<kBlockKV>;

  // One warp's work in matrix instructions of 16 x 8 x 16.
  static constexpr int kTilesQ = kRowsPerWarp / 16;
  static constexpr int kTilesKV = kBlockKV / 8 / kTeam;
  static constexpr int kTilesV = kHeadDimV / 8 / kTeam;
  static constexpr int kStepsQK = kHeadDim / 16;
  static constexpr int kStepsPV = kBlockKV / 16;

  // Accumulators; element e of a lane is row lane / 4 + 8 * (e / 2), column 2 * (lane % 4) + e % 2.
  using Scores = float[kTilesQ][kTilesKV][4];  // (kRowsPerWarp, kBlockKV / kTeam)
  using Output = float[kTilesQ][kTilesV][4];   // (kRowsPerWarp, kHeadDimV / kTeam)
};

// Shared memory: the addresses of its parts, and where in them a lane finds its matrix fragments.
template <class Traits>
struct Shared {
  static constexpr int kTeam = Traits::kTeam;
  static constexpr uint32_t kBytesQ = Traits::kBlockQ * Traits::QueryRows::kRowBytes;
  static constexpr uint32_t kBytesK = Traits::kBlockKV * Traits::KeyRows::kRowBytes;
  static constexpr uint32_t kBytesV = Traits::kBlockKV * Traits::ValueRows::kRowBytes;
  static constexpr uint32_t kBytesP =
      kTeam > 1 ? Traits::kBlockQ * Traits::WeightRows::kRowBytes : 0;
  static constexpr uint32_t kBytesRows = kTeam > 1 ? kTeam * Traits::kBlockQ * 4 : 0;
  static constexpr uint32_t kBytesKV = Traits::kStages * (kBytesK + kBytesV);
  static constexpr uint32_t kBytesBarriers = kTeam > 1 ? 6 * 8 + 16 : 0;
  static constexpr int kBytes = int(kBytesQ + kBytesKV + kBytesP + kBytesRows + kBytesBarriers);

  uint32_t value_lane_;
  uint32_t q;  // (kBlockQ, kHeadDim); O at the end

  __device__ __forceinline__ Shared() {
    extern __shared__ __align__(128) char shared_bytes[];
    q = opaque(shared_address(shared_bytes));
    const unsigned lane = threadIdx.x % 32;
    value_lane_ = opaque(
        uint32_t(Traits::ValueRows::offset(lane % 16, threadIdx.x / 32 % kTeam * 2 + lane / 16)));
  }

  // From the start of a K or V block to this lane's fragment. Computed at each use: registers are
  // for accumulators.
  __device__ __forceinline__ uint32_t key_lane() const {
    const unsigned thread = opaque(unsigned(threadIdx.x)), lane = thread % 32;
    const int part = thread / 32 % kTeam;
    const int key = part * 16 + lane % 8 + lane / 16 * 8;
    return Traits::KeyRows::offset(key, lane / 8 % 2);
  }
  __device__ __forceinline__ uint32_t value_lane() const { return value_lane_; }

  __device__ __forceinline__ uint32_t k(int j) const {  // (kBlockKV, kHeadDim)
    return q + kBytesQ + j % Traits::kStages * (kBytesK + kBytesV);
  }
  __device__ __forceinline__ uint32_t v(int j) const { return k(j) + kBytesK; }
  // What the warps of a team tell each other.
  __device__ __forceinline__ uint32_t p() const { return q + kBytesQ + kBytesKV; }
  __device__ __forceinline__ uint32_t row_values() const { return p() + kBytesP; }
  // Full: copied by every thread. Empty: read by every thread. Clean: free of NaN and infinities.
  enum Barrier { kFullQ, kFullK, kEmptyK, kFullV, kEmptyV, kCleanV, kBarriers };
  __device__ __forceinline__ uint32_t barrier(Barrier which) const {
    return row_values() + kBytesRows + which * 8;
  }
  // Whether any V of this CTA's tiles held NaN or infinity on an edge.
  __device__ __forceinline__ uint32_t poisoned() const { return barrier(kBarriers); }
};

}  // namespace flash::v2
