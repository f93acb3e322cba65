// Every compile-time choice of the forward pass: tiles, warps, stages and shared memory.
#pragma once

#include "common/dispatch.h"
#include "common/ptx.cuh"
#include "common/swizzle.cuh"

namespace flash::v2 {

// kFeatured serves softcap, scales that are not positive, and rows that are not 16-byte aligned.
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
  static constexpr int kWarps = 4 * kTeam;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowsPerWarp = 32;
  static constexpr int kBlockQ = kWarps / kTeam * kRowsPerWarp;
  static constexpr int kBlockKV = kFeatured        ? (kHeadDim <= 64 ? 64 : 32)
                                  : kHeadDim <= 64 ? 128
                                                   : 64;
  static constexpr int kStages = 2;             // blocks of K and V in the ring
  static constexpr int kCtasPerSm = 2 / kTeam;  // 8 warps: all registers, 255 each
  // Measured on one H200 (README): how many products ahead fragments are fetched, and over how many
  // products of S the copy of the next block is spread.
  static constexpr int kAhead = kTeam == 1 && kHeadDim > 64 ? 1 : 2;
  static constexpr int kCopyParts = kTeam == 1 && kHeadDim > 96 ? kHeadDim / 16 * kBlockKV / 16 : 1;

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
  static constexpr int kBytes = int(kBytesQ + kBytesKV + kBytesP + kBytesRows);

  uint32_t q;           // (kBlockQ, kHeadDim); O at the end
  uint32_t key_lane;    // from the start of a K block to this lane's fragment
  uint32_t value_lane;  // likewise of V

  __device__ __forceinline__ Shared() {
    extern __shared__ __align__(128) char shared_bytes[];
    q = opaque(shared_address(shared_bytes));
    const int lane = threadIdx.x % 32;
    const int part = threadIdx.x / 32 % kTeam;
    const int key = part * (Traits::kTilesKV * 8) + lane % 8 + lane / 16 * 8;
    key_lane = opaque(uint32_t(Traits::KeyRows::offset(key, lane / 8 % 2)));
    value_lane = opaque(uint32_t(Traits::ValueRows::offset(lane % 16, 2 * part + lane / 16)));
  }

  __device__ __forceinline__ uint32_t k(int j) const {  // (kBlockKV, kHeadDim)
    return q + kBytesQ + j % Traits::kStages * (kBytesK + kBytesV);
  }
  __device__ __forceinline__ uint32_t v(int j) const { return k(j) + kBytesK; }
  // What the warps of a team tell each other.
  __device__ __forceinline__ uint32_t p() const { return q + kBytesQ + kBytesKV; }
  __device__ __forceinline__ uint32_t row_values() const { return p() + kBytesP; }
};

}  // namespace flash::v2
