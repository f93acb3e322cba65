// Every compile-time choice of the forward pass: tiles, warps, stages and shared memory.
#pragma once

#include "common/dispatch.h"
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

  // A warp owns whole rows of Q, S, P and O: no value of a row ever crosses warps. More rows per
  // warp read each fragment of K and V from shared memory for more work; registers set the limit.
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowsPerWarp = kHeadDim <= 128 ? 32 : 16;
  static constexpr int kBlockQ = kWarps * kRowsPerWarp;
  static constexpr int kBlockKV = kHeadDim <= 128 ? 64 : kHeadDim <= 192 ? 48 : 32;
  static constexpr int kStages = 2;     // blocks of K and V in the ring
  static constexpr int kCtasPerSm = 2;  // one multiplies while the other is in its softmax
  static constexpr bool kQueryInRegisters = kHeadDim <= 64;

  using QueryRows = SwizzledRows<kHeadDim>;
  using KeyRows = SwizzledRows<kHeadDim>;
  using ValueRows = SwizzledRows<kHeadDimV>;

  // One warp's work in matrix instructions of 16 x 8 x 16.
  static constexpr int kTilesQ = kRowsPerWarp / 16;
  static constexpr int kTilesKV = kBlockKV / 8;
  static constexpr int kTilesV = kHeadDimV / 8;
  static constexpr int kStepsQK = kHeadDim / 16;
  static constexpr int kStepsPV = kBlockKV / 16;

  // Accumulators; element e of a lane is row lane / 4 + 8 * (e / 2), column 2 * (lane % 4) + e % 2.
  using Scores = float[kTilesQ][kTilesKV][4];  // (kRowsPerWarp, kBlockKV)
  using Output = float[kTilesQ][kTilesV][4];   // (kRowsPerWarp, kHeadDimV)
};

template <class Traits>
struct Shared {
  using Element = typename Traits::Element;
  struct Stage {
    Element k[Traits::kBlockKV * Traits::kHeadDim];   // (kBlockKV, kHeadDim)
    Element v[Traits::kBlockKV * Traits::kHeadDimV];  // (kBlockKV, kHeadDimV)
  };
  alignas(128) Element q[Traits::kBlockQ * Traits::kHeadDim];  // (kBlockQ, kHeadDim); O at the end
  alignas(128) Stage stages[Traits::kStages];

  __device__ __forceinline__ Stage& stage(int j) { return stages[j % Traits::kStages]; }
};

template <class Traits>
__device__ __forceinline__ Shared<Traits>& shared_memory() {
  extern __shared__ __align__(128) char shared_bytes[];
  return *reinterpret_cast<Shared<Traits>*>(shared_bytes);
}

}  // namespace flash::v2
