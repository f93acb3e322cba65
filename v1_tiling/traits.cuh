// Every compile-time choice of the forward pass: tiles, warps, stages and shared memory.
#pragma once

#include <type_traits>

#include "common/dispatch.h"
#include "common/ptx.cuh"
#include "common/swizzle.cuh"

namespace flash::v1 {

// kFeatured serves softcap, scales that are not positive, and rows that are not 16-byte aligned.
// kBeforeAmpere is for 64 KB of shared memory, matrix instructions that take fp16 only, and no
// asynchronous copies.
template <class Instance, bool kIsFeatured, bool kBeforeAmpere = false>
struct ForwardTraits {
  using Element = typename Instance::Element;
  static constexpr bool kFeatured = kIsFeatured;
  static constexpr bool kFloat32 = sizeof(Element) == 4;
  // What matrix instructions take. fp32 rows come as two rows of parts, one beside the other.
  using Part = std::conditional_t<kFloat32, fp16, Element>;
  static constexpr int kHeadDim = Instance::kHeadDim;
  static_assert(Instance::kHeadDimV == kHeadDim, "one width for Q, K, V and O");

  // A warp owns whole rows of Q, S, P and O: no value of a row ever crosses warps. More rows per
  // warp read each fragment of K and V from shared memory for more work; registers set the limit.
  static constexpr int kMaxWarps = 8;
  static constexpr int kMaxThreads = 32 * kMaxWarps;
  static constexpr bool kNarrow = kBeforeAmpere && kHeadDim > 64;
  static constexpr int kRowsPerWarp = kFloat32 || kNarrow ? 16 : 32;
  static constexpr int kBlockKV = kNarrow ? 32 : 64;
  static constexpr int kMaxStages = 16;  // blocks of K and V that stay on chip together, at most
  static constexpr bool kQueryInRegisters = kHeadDim <= 64 && !kFloat32;

  using Rows = SwizzledRows<kHeadDim* int(sizeof(Element)) / 2>;  // of Q, K and V
  static constexpr int kChunkElements = 16 / int(sizeof(Element));

  // One warp's work in matrix instructions of 16 x 8 x 16.
  static constexpr int kTilesQ = kRowsPerWarp / 16;
  static constexpr int kTilesKV = kBlockKV / 8;
  static constexpr int kTilesV = kHeadDim / 8;
  static constexpr int kStepsQK = kHeadDim / 16;
  static constexpr int kStepsPV = kBlockKV / 16;

  // Accumulators; element e of a lane is row lane / 4 + 8 * (e / 2), column 2 * (lane % 4) + e % 2.
  using Scores = float[kTilesQ][kTilesKV][4];  // (kRowsPerWarp, kBlockKV)
  using Output = float[kTilesQ][kTilesV][4];   // (kRowsPerWarp, kHeadDim)

  // What a Q block leaves in memory between two visits: O as the accumulators hold it, m and l.
  static constexpr int kStateFloats = kRowsPerWarp * (kHeadDim + 2);

  // A kernel has a body only in the images that it is for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr bool kRuns = kBeforeAmpere && std::is_same_v<Element, fp16>;
#else
  static constexpr bool kRuns = !kBeforeAmpere;
#endif
  static constexpr bool kAsyncCopies = !kBeforeAmpere;
};

// Where a K/V block lies: blocks [first_block, first_block + 2 * stages) can be asked for.
struct Ring {
  int stages;
  int first_block = 0;  // the block in stage first_stage, the first_round-th block there
  int first_stage = 0;
  uint32_t first_round = 0;
  int loaded = 0;  // blocks before this one are there, or under way

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
  // The block that was to come next is block j of another tile.
  __device__ __forceinline__ void rename(int j) {
    loaded += j - first_block;
    first_block = j;
  }
};

// Barriers and each warp's tile, then the ring of K/V blocks, then each warp's Q block. How many
// blocks and warps is decided at run time, by what the device has.
template <class Traits>
struct Shared {
  static constexpr int kBytesRows = Traits::kRowsPerWarp * Traits::Rows::kRowBytes;
  static constexpr int kBytesQ = kBytesRows + (Traits::kFloat32 ? 128 : 0);
  static constexpr int kBytesK = Traits::kBlockKV * Traits::Rows::kRowBytes;
  static constexpr int kBytesScales = Traits::kFloat32 ? 4 * Traits::kBlockKV : 0;
  static constexpr int kBytesStage = 2 * (kBytesK + kBytesScales);
  static constexpr int kKvFull = 0;
  static constexpr int kKvFree = kKvFull + 8 * Traits::kMaxStages;
  static constexpr int kQFull = kKvFree + 8 * Traits::kMaxStages;
  static constexpr int kTiles = 384;
  static constexpr int kBytesTile = 112;
  static constexpr int kStages = kTiles + 2 * Traits::kMaxWarps * kBytesTile;
  static_assert(kTiles >= kQFull + 8 * Traits::kMaxWarps && kStages % 128 == 0);

  static constexpr int bytes(int stages, int warps) {
    return kStages + stages * kBytesStage + warps * kBytesQ;
  }

  Ring ring;
  uint32_t q_round = 0;  // Q blocks that this warp has loaded

  static __device__ __forceinline__ char* base() {
    extern __shared__ __align__(128) char shared_bytes[];
    return shared_bytes;
  }
  static __device__ __forceinline__ uint32_t address(int offset) {
    return shared_address(base()) + offset;
  }

  __device__ __forceinline__ explicit Shared(int stages) : ring{stages} {
    if (threadIdx.x == 0) {
      for (int j = 0; j < stages; ++j) {
        barrier_init(kv_full(j), blockDim.x);
        barrier_init(kv_free(j), blockDim.x);
      }
    }
    if (threadIdx.x % 32 == 0) barrier_init(q_full(), 32);
    __syncthreads();  // every warp sees the barriers
  }

  __device__ __forceinline__ uint32_t kv_full(int j) const {
    return address(kKvFull + 8 * ring.stage(j));
  }
  __device__ __forceinline__ uint32_t kv_free(int j) const {
    return address(kKvFree + 8 * ring.stage(j));
  }
  __device__ __forceinline__ uint32_t k(int j) const {  // (kBlockKV, kHeadDim)
    return address(kStages + ring.stage(j) * kBytesStage);
  }
  __device__ __forceinline__ uint32_t v(int j) const { return k(j) + kBytesK; }
  // The powers of two of split rows of K and V.
  __device__ __forceinline__ uint32_t k_scales(int j) const { return k(j) + 2 * kBytesK; }
  __device__ __forceinline__ uint32_t v_scales(int j) const { return k_scales(j) + kBytesScales; }

  // Of this warp:
  __device__ __forceinline__ uint32_t q_full() const {
    return address(kQFull + threadIdx.x / 32 * 8);
  }
  __device__ __forceinline__ uint32_t q() const {  // (kRowsPerWarp, kHeadDim)
    return address(kStages + ring.stages * kBytesStage + threadIdx.x / 32 * kBytesQ);
  }
  __device__ __forceinline__ uint32_t q_scales() const { return q() + kBytesRows; }
  // The tile in work and the next one: here rather than in registers, which O and S need.
  template <class Tile>
  __device__ __forceinline__ Tile& tile(int ahead) const {
    static_assert(sizeof(Tile) <= kBytesTile);
    const int n = threadIdx.x / 32 * 2 + ahead;
    return *reinterpret_cast<Tile*>(base() + kTiles + n * kBytesTile);
  }
};

}  // namespace flash::v1
