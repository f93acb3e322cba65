// Every compile-time choice of the forward pass: tiles, warps, stages and shared memory.
#pragma once

#include <type_traits>

#include "common/dispatch.h"
#include "common/ptx.cuh"
#include "common/swizzle.cuh"

namespace flash::v1 {

// kFeatured serves softcap, scales that are not positive, and rows that are not 16-byte aligned.
template <class Instance, bool kIsFeatured>
struct ForwardTraits {
  using Element = typename Instance::Element;
  static constexpr bool kFeatured = kIsFeatured;
  static constexpr bool kFloat32 = sizeof(Element) == 4;
  static constexpr int kHeadDim = Instance::kHeadDim;
  static_assert(Instance::kHeadDimV == kHeadDim, "one width for Q, K, V and O");

  // A warp owns whole rows of Q, S, P and O: no value of a row ever crosses warps. More rows per
  // warp read each fragment of K and V from shared memory for more work; registers set the limit.
  static constexpr int kMaxWarps = 8;
  static constexpr int kMaxThreads = 32 * kMaxWarps;
  static constexpr int kRowsPerWarp = kFloat32 ? 16 : 32;
  static constexpr int kBlockKV = kFloat32 ? 32 : 64;
  static constexpr int kMaxStages = 16;  // blocks of K and V that stay on chip together, at most
  static constexpr bool kQueryInRegisters = kHeadDim <= 64 && !kFloat32;

  using Rows = SwizzledRows<kHeadDim* int(sizeof(Element)) / 2>;  // of Q, K and V
  static constexpr int kChunkElements = 16 / int(sizeof(Element));

  // One warp's work in matrix instructions of 16 x 8 x kDepth.
  static constexpr int kDepth = 32 / int(sizeof(Element));
  static constexpr int kTilesQ = kRowsPerWarp / 16;
  static constexpr int kTilesKV = kBlockKV / 8;
  static constexpr int kTilesV = kHeadDim / 8;
  static constexpr int kStepsQK = kHeadDim / kDepth;
  static constexpr int kStepsPV = kBlockKV / kDepth;

  // Accumulators; element e of a lane is row lane / 4 + 8 * (e / 2), column 2 * (lane % 4) + e % 2.
  using Scores = float[kTilesQ][kTilesKV][4];  // (kRowsPerWarp, kBlockKV)
  using Output = float[kTilesQ][kTilesV][4];   // (kRowsPerWarp, kHeadDim)

  // What a Q block leaves in memory between two visits: O as the accumulators hold it, m and l.
  static constexpr int kStateFloats = kRowsPerWarp * (kHeadDim + 2);

  // Before sm_80 no matrix instruction takes bf16 or tf32: there these kernels are empty.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr bool kRuns = std::is_same_v<Element, fp16>;
#else
  static constexpr bool kRuns = true;
#endif
};

// Barriers, then a ring of K/V blocks, then one Q block per warp. How many blocks and warps is
// decided at run time, by what the device has. Block j lies in stage(j); `round(j)` says how often
// that stage was filled before.
template <class Traits>
struct Shared {
  static constexpr int kBytesQ = Traits::kRowsPerWarp * Traits::Rows::kRowBytes;
  static constexpr int kBytesK = Traits::kBlockKV * Traits::Rows::kRowBytes;
  static constexpr int kBytesBarriers = 384;
  static_assert(kBytesBarriers >= 8 * (2 * Traits::kMaxStages + Traits::kMaxWarps), "too small");

  static constexpr int bytes(int stages, int warps) {
    return kBytesBarriers + stages * 2 * kBytesK + warps * kBytesQ;
  }

  uint32_t base;
  int stages;
  int first_block = 0;  // the block in `first_stage`
  int first_stage = 0;
  uint32_t first_round = 0;

  uint32_t q_round = 0;  // Q blocks that this warp has loaded

  // Blocks from `first_block` on, fewer than 2 * stages of them, can be asked for.
  __device__ __forceinline__ int stage(int j) const {
    const int n = first_stage + j - first_block;
    return n < stages ? n : n < 2 * stages ? n - stages : n - 2 * stages;
  }
  __device__ __forceinline__ uint32_t round(int j) const {
    const int n = first_stage + j - first_block;
    return first_round + (n < stages ? 0 : n < 2 * stages ? 1 : 2);
  }
  __device__ __forceinline__ void advance(int j) {
    const int stage_j = stage(j);
    first_round = round(j), first_stage = stage_j, first_block = j;
  }
  // The next block to come, of a new slice, is block j.
  __device__ __forceinline__ void restart(int j) { first_block = j; }

  __device__ __forceinline__ uint32_t kv_full(int j) const { return base + 8 * stage(j); }
  __device__ __forceinline__ uint32_t kv_free(int j) const { return kv_full(j) + 128; }
  __device__ __forceinline__ uint32_t q_full() const { return base + 256 + threadIdx.x / 32 * 8; }
  __device__ __forceinline__ uint32_t k(int j) const {  // (kBlockKV, kHeadDim)
    return base + kBytesBarriers + stage(j) * 2 * kBytesK;
  }
  __device__ __forceinline__ uint32_t v(int j) const { return k(j) + kBytesK; }
  __device__ __forceinline__ uint32_t q() const {  // (kRowsPerWarp, kHeadDim) of this warp
    return base + kBytesBarriers + stages * 2 * kBytesK + threadIdx.x / 32 * kBytesQ;
  }
};

template <class Traits>
__device__ __forceinline__ Shared<Traits> shared_memory(int stages) {
  extern __shared__ __align__(128) char shared_bytes[];
  Shared<Traits> smem{shared_address(shared_bytes), stages};
  if (threadIdx.x == 0) {
    for (int j = 0; j < stages; ++j) {
      barrier_init(smem.kv_full(j), blockDim.x);
      barrier_init(smem.kv_free(j), blockDim.x / 32);
    }
  }
  if (threadIdx.x % 32 == 0) barrier_init(smem.q_full(), 32);
  __syncthreads();  // every warp sees the barriers
  return smem;
}

}  // namespace flash::v1
