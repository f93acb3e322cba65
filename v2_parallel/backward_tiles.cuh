// The verbs of the backward pass: load, multiply, exponentiate, exchange and store tiles.
#pragma once

#include <math_constants.h>

#include "common/mask.cuh"
#include "common/ptx.cuh"
#include "v2_parallel/backward_traits.cuh"
#include "v2_parallel/load.cuh"

namespace flash::v2 {

inline constexpr float kLog2e = 1.4426950408889634f;

// One query block of one head; `blocks` per sequence.
template <int kRows>
struct RowBlock {
  int row, head, batch;

  __device__ __forceinline__ RowBlock(const BackwardParams& p, int blocks) {
    const int64_t index = blockIdx.x;
    row = int(index % blocks) * kRows;
    head = int(index / blocks % p.heads_q);
    batch = int(index / blocks / p.heads_q);
  }
};

// The same value, which the compiler must take for a new one.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// --- load

// Zeros in place of NaN and infinities; true if there was any.
template <class Element>
__device__ __forceinline__ bool remove_non_finite(uint32_t (&words)[4]) {
  constexpr uint32_t kLow = kExponentBits<Element>, kHigh = kLow << 16;
  bool found = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!any_non_finite<Element>(words[i])) continue;
    found = true;
    if ((words[i] & kLow) == kLow) words[i] &= 0xffff0000u;
    if ((words[i] & kHigh) == kHigh) words[i] &= 0x0000ffffu;
  }
  return found;
}

template <class Element>
__device__ __forceinline__ bool rows_aligned(const Element* data, int64_t stride) {
  return reinterpret_cast<uint64_t>(data) % 16 == 0 && stride % 8 == 0;
}

// One block of rows of one head into shared memory; rows outside `valid` and channels past
// head_dim arrive as zeros, whatever the memory holds.
template <class Traits, int kRows>
__device__ __forceinline__ void load_block(typename Traits::Element* target, const View& view,
                                           int64_t origin, int row, Range valid, int head_dim) {
  using Element = typename Traits::Element;
  using Map = CopyMap<Traits::kHeadDim, Traits::kThreads>;
  const uint32_t base = shared_address(target);
  const Element* source = static_cast<const Element*>(view.data) + origin + row * view.row;
  const int begin = valid.begin - row, end = valid.end - row;
  const bool aligned = !Traits::kFeatured || rows_aligned(source, view.row);
  Map::template for_each<kRows>([&](int r, int chunk, int offset) {
    const Element* from = source + r * view.row + chunk * 8;
    const bool in_range = r >= begin && r < end && chunk * 8 < head_dim;
    if (aligned) {
      cp_async_16(base + offset, from, in_range);
    } else {
      copy_unaligned(base + offset, from, in_range);
    }
  });
}

// Removes NaN and infinities from a block of keys, which dQ = dS K would spread to rows that do
// not see them; poison[key] makes the rows that do see them NaN. True if there was any.
template <class Traits, int kRows>
__device__ __forceinline__ bool scrub_keys(typename Traits::Element* keys, float* poison) {
  using Map = CopyMap<Traits::kHeadDim, Traits::kThreads>;
  const uint32_t base = shared_address(keys);
  for (int r = threadIdx.x; r < kRows; r += Traits::kThreads) poison[r] = 0.0f;
  __syncthreads();  // the block has arrived, poison is clear
  bool found = false;
  Map::template for_each<kRows>([&](int r, int, int offset) {
    uint32_t words[4];
    load_shared_16(words, base + offset);
    if (!remove_non_finite<typename Traits::Element>(words)) return;
    store_shared_16(base + offset, words);
    poison[r] = CUDART_NAN_F;
    found = true;
  });
  return __syncthreads_or(found);  // clean keys and their poison are visible
}

// One block of a row statistic; the workspace is padded, so no row is out of range.
template <int kRows>
__device__ __forceinline__ void load_stats(float* target, const float* source, int tid) {
  if (tid < kRows / 4) cp_async_16(shared_address(target + tid * 4), source + tid * 4, true);
}

// --- fragments of the matrix instruction (m16n8k16)

// A (16, 16) from a tile whose rows are A's rows.
template <class Rows>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t base, int row, int chunk,
                                       int lane) {
  ldmatrix_x4(a, base + Rows::offset(row + (lane & 15), chunk + (lane >> 4)));
}

// A (16, 16) from a tile whose columns are A's rows.
template <class Rows>
__device__ __forceinline__ void load_a_trans(uint32_t (&a)[4], uint32_t base, int row, int chunk,
                                             int lane) {
  ldmatrix_x4_trans(
      a, base + Rows::offset(row + (lane & 7) + (lane >> 4) * 8, chunk + ((lane >> 3) & 1)));
}

// Two B (16, 8) from a tile whose rows are B's columns.
template <class Rows>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t base, int row, int chunk,
                                       int lane) {
  ldmatrix_x4(b,
              base + Rows::offset(row + (lane & 7) + (lane >> 4) * 8, chunk + ((lane >> 3) & 1)));
}

// Two B (16, 8) from a tile whose rows are B's rows.
template <class Rows>
__device__ __forceinline__ void load_b_trans(uint32_t (&b)[4], uint32_t base, int row, int chunk,
                                             int lane) {
  ldmatrix_x4_trans(b, base + Rows::offset(row + (lane & 15), chunk + (lane >> 4)));
}

// --- products

// S^T += K Q^T, and dP^T += V dO^T: 32 keys of this warp against kWarpQ rows.
template <class Traits>
__device__ __forceinline__ void gemm_scores(float (&rS)[2][Traits::kWarpQ / 8][4], uint32_t keys,
                                            int key, uint32_t rows, int row, int lane) {
  using Rows = typename Traits::Rows;
#pragma unroll
  for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) load_a<Rows>(a[m], keys, key + m * 16, k * 2, lane);
#pragma unroll
    for (int n = 0; n < Traits::kWarpQ / 16; ++n) {
      uint32_t b[4];
      load_b<Rows>(b, rows, row + n * 16, k * 2, lane);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_m16n8k16<typename Traits::Element>(rS[m][n * 2], a[m], b[0], b[1]);
        mma_m16n8k16<typename Traits::Element>(rS[m][n * 2 + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// dV += P^T dO, and dK += dS^T Q: 32 keys of this warp, its slice of the channels, kStepQ rows.
// With one warp per key slice P^T comes from registers, else from shared memory.
template <class Traits>
__device__ __forceinline__ void gemm_keys(float (&rdK)[2][Traits::kWarpDim / 8][4],
                                          const uint32_t (&rP)[2][Traits::kWarpQ / 16][4],
                                          uint32_t scores, int key, uint32_t rows, int row,
                                          int chunk, int lane) {
  using Rows = typename Traits::Rows;
#pragma unroll
  for (int k = 0; k < Traits::kStepQ / 16; ++k) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if constexpr (Traits::kSplit == 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = rP[m][k][i];
      } else {
        load_a<typename Traits::Scores>(a[m], scores, key + m * 16, k * 2, lane);
      }
    }
#pragma unroll
    for (int n = 0; n < Traits::kWarpDim / 16; ++n) {
      uint32_t b[4];
      load_b_trans<Rows>(b, rows, row + k * 16, chunk + n * 2, lane);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_m16n8k16<typename Traits::Element>(rdK[m][n * 2], a[m], b[0], b[1]);
        mma_m16n8k16<typename Traits::Element>(rdK[m][n * 2 + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// dQ = dS K: this warp's rows and channels, all keys of the block.
template <class Traits>
__device__ __forceinline__ void gemm_dq(float (&rdQ)[Traits::kDqRows / 16][Traits::kDqDim / 8][4],
                                        uint32_t ds, int row, uint32_t keys, int chunk, int lane) {
  constexpr int kTiles = Traits::kDqRows / 16;
#pragma unroll
  for (int k = 0; k < Traits::kBlockKV / 16; ++k) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      load_a_trans<typename Traits::Scores>(a[m], ds, k * 16, row / 8 + m * 2, lane);
    }
#pragma unroll
    for (int n = 0; n < Traits::kDqDim / 16; ++n) {
      uint32_t b[4];
      load_b_trans<typename Traits::Rows>(b, keys, k * 16, chunk + n * 2, lane);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma_m16n8k16<typename Traits::Element>(rdQ[m][n * 2], a[m], b[0], b[1]);
        mma_m16n8k16<typename Traits::Element>(rdQ[m][n * 2 + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// --- scores

// Where an accumulator element lies in the block of scores. Accumulator rows are keys in the main
// kernel (S^T) and query rows in the deterministic dQ kernel (S).
struct KeysByRows {
  static __device__ __forceinline__ int key(int m, int n, int e, int lane) {
    return m * 16 + lane / 4 + e / 2 * 8;
  }
  static __device__ __forceinline__ int row(int m, int n, int e, int lane) {
    return n * 8 + lane % 4 * 2 + e % 2;
  }
};
struct RowsByKeys {
  static __device__ __forceinline__ int key(int m, int n, int e, int lane) {
    return KeysByRows::row(m, n, e, lane);
  }
  static __device__ __forceinline__ int row(int m, int n, int e, int lane) {
    return KeysByRows::key(m, n, e, lane);
  }
};

// Every accumulator starts at the negative of its row's statistic.
template <class Place, int kTiles>
__device__ __forceinline__ void start_negative(float (&acc)[2][kTiles][4], const float* stats,
                                               int lane) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = -stats[Place::row(m, n, e, lane)];
    }
  }
}

// tanh to fp32 accuracy in two special-function instructions.
__device__ __forceinline__ float fast_tanh(float x) {
  return 1.0f - 2.0f / (fast_exp2(x * (2.0f * kLog2e)) + 1.0f);
}

// P = exp2(S * scale - LSE), rounded into rP, 0 where the row must not see the key; rS keeps the
// factor of dP in fp32: P, or with softcap P times the derivative of the cap. `lse` and `poison`
// point to the block's first row and key.
template <class Traits, class Place, bool kMasked>
__device__ __forceinline__ void exponentiate(uint32_t (&rP)[2][Traits::kWarpQ / 16][4],
                                             float (&rS)[2][Traits::kWarpQ / 8][4],
                                             const BackwardParams& p, const Sequence& sequence,
                                             const float* lse, const float* poison, int row,
                                             int key, int lane) {
  using Element = typename Traits::Element;
  const bool capped = Traits::kFeatured && p.softcap != 0.0f;
  const float scale = capped ? p.scale / p.softcap : p.scale * kLog2e;
#pragma unroll
  for (int n = 0; n < Traits::kWarpQ / 8; ++n) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float probability[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = Place::row(m, n, e, lane), c = Place::key(m, n, e, lane);
        float s = rS[m][n][e] * scale, derivative = 1.0f;
        if (capped) {
          const float t = fast_tanh(s);
          s = t * (p.softcap * kLog2e);
          derivative = 1.0f - t * t;
        }
        probability[e] = fast_exp2(s - lse[r]);
        if constexpr (kMasked) {
          probability[e] = sequence.visible(row + r, key + c) ? probability[e] + poison[c] : 0.0f;
        }
        rS[m][n][e] = probability[e] * derivative;
      }
      rP[m][n / 2][n % 2 * 2] = pack<Element>(probability[0], probability[1]);
      rP[m][n / 2][n % 2 * 2 + 1] = pack<Element>(probability[2], probability[3]);
    }
  }
}

// dP does not matter where P is exactly 0: not even if it is NaN.
template <int kTiles>
__device__ __forceinline__ void mask_dp(float (&rdP)[2][kTiles][4],
                                        const float (&rS)[2][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (rS[m][n][e] == 0.0f) rdP[m][n][e] = 0.0f;
      }
    }
  }
}

// dS = P * (dP - delta), rounded.
template <class Element, int kTiles>
__device__ __forceinline__ void multiply_ds(uint32_t (&rdS)[2][kTiles / 2][4],
                                            const float (&rdP)[2][kTiles][4],
                                            const float (&rS)[2][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        rdS[m][n / 2][n % 2 * 2 + h] = pack<Element>(rdP[m][n][2 * h] * rS[m][n][2 * h],
                                                     rdP[m][n][2 * h + 1] * rS[m][n][2 * h + 1]);
      }
    }
  }
}

// Fragments of P^T or dS^T to shared memory, where other warps read them.
template <class Traits>
__device__ __forceinline__ void store_scores(typename Traits::Element* target,
                                             const uint32_t (&r)[2][Traits::kWarpQ / 16][4],
                                             int key, int row, int lane) {
  char* base = reinterpret_cast<char*>(target) + (lane & 3) * 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kWarpQ / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = key + m * 16 + half * 8 + lane / 4;
        *reinterpret_cast<uint32_t*>(base + Traits::Scores::offset(c, row / 8 + n)) =
            r[m][n / 2][n % 2 * 2 + half];
      }
    }
  }
}

// --- results

// Adds one 16 x 8 accumulator tile to dQ in fragment order, 512 contiguous bytes a warp.
__device__ __forceinline__ void add_fragment(float* tile, const float (&r)[4], int lane) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(tile + lane * 4), "f"(r[0]),
               "f"(r[1]), "f"(r[2]), "f"(r[3])
               : "memory");
#else
#pragma unroll
  for (int e = 0; e < 4; ++e) atomicAdd(tile + e * 32 + lane, r[e]);
#endif
}

// Position of element e of a lane in that order.
__device__ __forceinline__ int fragment_offset(int lane, int e) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return lane * 4 + e;
#else
  return e * 32 + lane;
#endif
}

template <class Traits>
__device__ __forceinline__ void add_dq(
    float* block, const float (&rdQ)[Traits::kDqRows / 16][Traits::kDqDim / 8][4], int row,
    int chunk, int lane) {
#pragma unroll
  for (int m = 0; m < Traits::kDqRows / 16; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kDqDim / 8; ++n) {
      const int tile = (row / 16 + m) * (Traits::kHeadDim / 8) + chunk + n;
      add_fragment(block + tile * 128, rdQ[m][n], lane);
    }
  }
}

// dK or dV, scaled and rounded, into a shared tile of rows.
template <class Traits>
__device__ __forceinline__ void stage_keys(typename Traits::Element* target,
                                           const float (&r)[2][Traits::kWarpDim / 8][4],
                                           float scale, int key, int chunk, int lane) {
  using Element = typename Traits::Element;
  char* base = reinterpret_cast<char*>(target) + (lane & 3) * 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kWarpDim / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = key + m * 16 + half * 8 + lane / 4;
        *reinterpret_cast<uint32_t*>(base + Traits::Rows::offset(c, chunk + n)) =
            pack<Element>(r[m][n][half * 2] * scale, r[m][n][half * 2 + 1] * scale);
      }
    }
  }
}

// Eight 16-bit elements to global memory.
template <class Element>
__device__ __forceinline__ void store_chunk(Element* target, uint4 x, bool aligned) {
  if (aligned) {
    *reinterpret_cast<uint4*>(target) = x;
  } else {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      reinterpret_cast<uint16_t*>(target)[i] = uint16_t(words[i / 2] >> (i % 2 * 16));
    }
  }
}

// A shared block of rows to global memory; never past the last row or channel.
template <class Traits, int kRows>
__device__ __forceinline__ void store_block(const View& view, int64_t origin, int row, int end,
                                            int head_dim,
                                            const typename Traits::Element* source) {
  using Element = typename Traits::Element;
  using Map = CopyMap<Traits::kHeadDim, Traits::kThreads>;
  Element* target = static_cast<Element*>(view.data) + origin + row * view.row;
  const char* base = reinterpret_cast<const char*>(source);
  const bool aligned = !Traits::kFeatured || rows_aligned(target, view.row);
  Map::template for_each<kRows>([&](int r, int chunk, int offset) {
    if (row + r < end && chunk * 8 < head_dim) {
      store_chunk(target + r * view.row + chunk * 8,
                  *reinterpret_cast<const uint4*>(base + offset), aligned);
    }
  });
}

}  // namespace flash::v2
