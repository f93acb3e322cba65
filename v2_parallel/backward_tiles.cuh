// The verbs of the backward pass: load, multiply, exponentiate, exchange and store tiles.
#pragma once

#include <math_constants.h>

#include "common/mask.cuh"
#include "common/ptx.cuh"
#include "v2_parallel/backward_traits.cuh"

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

// Row `row` of one head of one sequence, whose rows start at `first`.
template <class Element>
__device__ __forceinline__ Element* row_of(const View& view, int batch, int64_t first, int head,
                                           int row) {
  return static_cast<Element*>(view.data) + batch * view.batch + (first + row) * view.row +
         head * view.head;
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

// How the threads of a CTA share the 16-byte chunks of a block of rows: 4 or 8 neighbours take
// consecutive chunks of one row.
template <class Traits>
struct BlockCopy {
  using Rows = typename Traits::Rows;
  static constexpr int kLanesPerRow = Rows::kSpan;
  static constexpr int kRowsPerPass = Traits::kThreads / kLanesPerRow;

  // Calls visit(row, chunk, byte offset in shared memory, pointer) for each chunk of this thread;
  // `data` is the block's first row. One pointer walks down the rows: many would need registers.
  template <int kRows, class Pointer, class Visit>
  static __device__ __forceinline__ void for_each(Pointer data, int64_t stride, Visit visit) {
    static_assert(kRows % kRowsPerPass == 0 && kRowsPerPass % 8 == 0);
    const int lane_row = threadIdx.x / kLanesPerRow, lane_chunk = threadIdx.x % kLanesPerRow;
    const int offset = Rows::offset(lane_row, lane_chunk);
    data += lane_row * stride + lane_chunk * 8;
#pragma unroll
    for (int row = 0; row < kRows; row += kRowsPerPass) {
#pragma unroll
      for (int chunk = 0; chunk < Rows::kChunks; chunk += kLanesPerRow) {
        visit(lane_row + row, lane_chunk + chunk, offset + row * Rows::kRowBytes + chunk * 16,
              data + chunk * 8);
      }
      data += kRowsPerPass * stride;
      asm volatile("" : "+l"(data));
    }
  }
};

// Eight 16-bit elements from global memory; one by one when rows are not 16-byte aligned.
template <class Element>
__device__ __forceinline__ uint4 load_chunk(const Element* source, bool aligned) {
  if (aligned) return *reinterpret_cast<const uint4*>(source);
  const auto* halves = reinterpret_cast<const uint16_t*>(source);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = halves[2 * i] | uint32_t(halves[2 * i + 1]) << 16;
  return uint4{words[0], words[1], words[2], words[3]};
}

// One block of rows of one head into shared memory; rows outside `valid` and channels past
// head_dim arrive as zeros, whatever the memory holds. `source` is the block's first row.
template <class Traits, int kRows>
__device__ __forceinline__ void load_block(typename Traits::Element* target,
                                           const typename Traits::Element* source, int64_t stride,
                                           int row, Range valid, int head_dim) {
  using Copy = BlockCopy<Traits>;
  const uint32_t base = shared_address(target);
  const int begin = valid.begin - row, end = valid.end - row;
  const bool aligned = !Traits::kFeatured || rows_aligned(source, stride);
  if (aligned && begin <= 0 && end >= kRows && head_dim == Traits::kHeadDim) {
    Copy::template for_each<kRows>(source, stride, [&](int, int, int offset, const auto* from) {
      cp_async_16(base + offset, from, true);
    });
    return;
  }
  Copy::template for_each<kRows>(
      source, stride, [&](int r, int chunk, int offset, const auto* from) {
        const bool in_range = r >= begin && r < end && chunk * 8 < head_dim;
        if (aligned) {
          cp_async_16(base + offset, from, in_range);
        } else {
          const uint4 x = in_range ? load_chunk(from, false) : uint4{};
          store_shared_16(base + offset, {x.x, x.y, x.z, x.w});
        }
      });
}

// Removes NaN and infinities from a block of keys, which dQ = dS K would spread to rows that do
// not see them; poison[key] is a mask that makes the rows that do see them NaN. True if there was any.
template <class Traits, int kRows>
__device__ __forceinline__ bool scrub_keys(typename Traits::Element* keys, uint32_t* poison) {
  using Copy = BlockCopy<Traits>;
  const uint32_t base = shared_address(keys);
  for (int r = threadIdx.x; r < kRows; r += Traits::kThreads) poison[r] = 0;
  __syncthreads();  // the block has arrived, poison is clear
  bool found = false;
  Copy::template for_each<kRows>(keys, 0, [&](int r, int, int offset, const auto*) {
    uint32_t words[4];
    load_shared_16(words, base + offset);
    if (!remove_non_finite<typename Traits::Element>(words)) return;
    store_shared_16(base + offset, words);
    poison[r] = ~0u;
    found = true;
  });
  return __syncthreads_or(found);  // clean keys and their poison are visible
}

// One block of a row statistic; the workspace is padded, so no row is out of range.
template <int kRows>
__device__ __forceinline__ void load_stats(float* target, const float* source, int tid) {
  if (tid < kRows / 4) cp_async_16(shared_address(target + tid * 4), source + tid * 4, true);
}

// --- products: addresses hold the lane's part, so that a step of the loops is one XOR or less

// This lane's offset for a left operand stored by rows, or a right operand stored transposed.
template <class Rows>
__device__ __forceinline__ uint32_t lane_rows(int lane) {
  return Rows::offset(lane % 16, lane / 16);
}

// And for a right operand stored by columns, or a left operand stored transposed.
template <class Rows>
__device__ __forceinline__ uint32_t lane_columns(int lane) {
  return Rows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// S^T += K Q^T, and dP^T += V dO^T: 32 keys of this warp against kWarpQ rows. between(i) is other
// work, one part for each of the kScoreTiles tiles, that hides behind the products.
template <class Traits, class Between>
__device__ __forceinline__ void gemm_scores(float (&rS)[2][Traits::kWarpQ / 8][4], uint32_t keys,
                                            uint32_t rows, Between between) {
  using Rows = typename Traits::Rows;
  constexpr int kSteps = Traits::kHeadDim / 16, kParts = Traits::kScoreTiles;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      ldmatrix_x4(a[m], Rows::advance(keys, k * 2) + m * 16 * Rows::kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < Traits::kWarpQ / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, Rows::advance(rows, k * 2) + n * 16 * Rows::kRowBytes);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_m16n8k16<typename Traits::Element>(rS[m][n * 2], a[m], b[0], b[1]);
        mma_m16n8k16<typename Traits::Element>(rS[m][n * 2 + 1], a[m], b[2], b[3]);
      }
    }
#pragma unroll
    for (int i = k * kParts / kSteps; i < (k + 1) * kParts / kSteps; ++i) between(i);
  }
}

// dV += P^T dO, and dK += dS^T Q: 32 keys of this warp, its slice of the channels, kStepQ rows. Its
// own slice of P^T comes from registers, those of the other warps from shared memory.
template <class Traits>
__device__ __forceinline__ void gemm_keys(float (&rdK)[2][Traits::kWarpDim / 8][4],
                                          const uint32_t (&rP)[2][Traits::kWarpQ / 16][4],
                                          uint32_t scores, uint32_t rows, int slice) {
  using Rows = typename Traits::Rows;
  constexpr int kOwn = Traits::kWarpQ / 16;
#pragma unroll
  for (int k = 0; k < Traits::kStepQ / 16; ++k) {
    const int step = (slice * kOwn + k) % (Traits::kStepQ / 16);  // own rows first
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (k < kOwn) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = rP[m][k % kOwn][i];
      } else {
        ldmatrix_x4(a[m], (scores ^ (step * 32)) + m * 16 * Traits::Scores::kRowBytes);
      }
    }
#pragma unroll
    for (int n = 0; n < Traits::kWarpDim / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, Rows::advance(rows + step * (16 * Rows::kRowBytes),
                                         n * Traits::kSplit * 2));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma_m16n8k16<typename Traits::Element>(rdK[m][n * 2], a[m], b[0], b[1]);
        mma_m16n8k16<typename Traits::Element>(rdK[m][n * 2 + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// dQ = dS K: this warp's rows and the channels of one pass, all keys of the block.
template <class Traits>
__device__ __forceinline__ void gemm_dq(
    float (&rdQ)[Traits::kDqRows / 16][Traits::kDqPassDim / 8][4], uint32_t ds, uint32_t keys,
    int pass) {
  using Rows = typename Traits::Rows;
  constexpr int kTiles = Traits::kDqRows / 16, kColumns = Traits::kDqPassDim / 16;
#pragma unroll
  for (int k = 0; k < Traits::kBlockKV / 16; ++k) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      ldmatrix_x4_trans(a[m], Traits::Scores::advance(ds, m * 2) +
                                  k * 16 * Traits::Scores::kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      uint32_t b[4];
      const int column = (pass * kColumns + n) * Traits::kDqWarpsDim * 2;
      ldmatrix_x4_trans(b, Rows::advance(keys, column) + k * 16 * Rows::kRowBytes);
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

// rS = P = exp2(S * scale - LSE) for tile i. With softcap rS is the factor of dP, which is P times
// the derivative of the cap, and P is rounded into rP at once.
template <class Traits, class Place>
__device__ __forceinline__ void exponentiate(uint32_t (&rP)[2][Traits::kWarpQ / 16][4],
                                             float (&rS)[2][Traits::kWarpQ / 8][4],
                                             const BackwardParams& p, const float* lse, int i,
                                             int lane) {
  using Element = typename Traits::Element;
  const int m = i % 2, n = i / 2;
  const bool capped = Traits::kFeatured && p.softcap != 0.0f;
  const float scale = capped ? p.scale / p.softcap : p.scale * kLog2e;
  float derivative[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    float s = rS[m][n][e] * scale;
    if (capped) {
      const float t = fast_tanh(s);
      s = t * (p.softcap * kLog2e);
      derivative[e] = 1.0f - t * t;
    }
    rS[m][n][e] = fast_exp2(s - lse[Place::row(m, n, e, lane)]);
  }
  if constexpr (Traits::kFeatured) {
    rP[m][n / 2][n % 2 * 2] = pack<Element>(rS[m][n][0], rS[m][n][1]);
    rP[m][n / 2][n % 2 * 2 + 1] = pack<Element>(rS[m][n][2], rS[m][n][3]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (capped) rS[m][n][e] *= derivative[e];
    }
  }
}

// P and dS become 0 where the row must not see the key, whatever the products gave, and NaN where
// it sees a key that was not finite.
template <class Traits, class Place>
__device__ __forceinline__ void mask(uint32_t (&rP)[2][Traits::kWarpQ / 16][4],
                                     float (&rS)[2][Traits::kWarpQ / 8][4],
                                     float (&rdP)[2][Traits::kWarpQ / 8][4],
                                     Sequence sequence, const uint32_t* poison, int row,
                                     int key, int lane) {
  const unsigned band = sequence.last - sequence.first;
  const int diagonal = row - key + sequence.last, keys = sequence.seqlen_k - key;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kWarpQ / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = Place::row(m, n, e, lane), c = Place::key(m, n, e, lane);
        const bool in_band = unsigned(diagonal + r - c) <= band;
        const uint32_t visible = in_band & (c < keys) ? ~0u : 0;
        if constexpr (Traits::kFeatured) {
          const uint32_t half = e % 2 == 0 ? 0x0000ffffu : 0xffff0000u;
          uint32_t& pair = rP[m][n / 2][n % 2 * 2 + e / 2];
          pair = (pair & (visible | ~half)) | (poison[c] & visible & half);
        }
        rS[m][n][e] = __uint_as_float((__float_as_uint(rS[m][n][e]) | poison[c]) & visible);
        rdP[m][n][e] = __uint_as_float(__float_as_uint(rdP[m][n][e]) & visible);
      }
    }
  }
}

// P, rounded, unless softcap had to do that before.
template <class Traits>
__device__ __forceinline__ void round_p(uint32_t (&rP)[2][Traits::kWarpQ / 16][4],
                                        const float (&rS)[2][Traits::kWarpQ / 8][4]) {
  if constexpr (Traits::kFeatured) return;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kWarpQ / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        rP[m][n / 2][n % 2 * 2 + h] =
            pack<typename Traits::Element>(rS[m][n][2 * h], rS[m][n][2 * h + 1]);
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

// Adds this warp's share of one pass; `target` is its first tile in the block.
template <class Traits>
__device__ __forceinline__ void add_dq(
    float* target, const float (&rdQ)[Traits::kDqRows / 16][Traits::kDqPassDim / 8][4], int pass,
    int lane) {
  constexpr int kColumns = Traits::kDqPassDim / 16;
#pragma unroll
  for (int m = 0; m < Traits::kDqRows / 16; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns * 2; ++n) {
      const int chunk = (pass * kColumns + n / 2) * Traits::kDqWarpsDim * 2 + n % 2;
      add_fragment(target + (m * (Traits::kHeadDim / 8) + chunk) * 128, rdQ[m][n], lane);
    }
  }
}

// dK or dV, scaled and rounded, into a shared tile of rows.
template <class Traits>
__device__ __forceinline__ void stage_keys(typename Traits::Element* target,
                                           const float (&r)[2][Traits::kWarpDim / 8][4],
                                           float scale, int key, int slice, int lane) {
  using Element = typename Traits::Element;
  char* base = reinterpret_cast<char*>(target) + (lane & 3) * 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kWarpDim / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = key + m * 16 + half * 8 + lane / 4;
        const int chunk = (n / 2 * Traits::kSplit + slice) * 2 + n % 2;
        *reinterpret_cast<uint32_t*>(base + Traits::Rows::offset(c, chunk)) =
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
__device__ __forceinline__ void store_block(typename Traits::Element* target, int64_t stride,
                                            int rows, int head_dim,
                                            const typename Traits::Element* source) {
  using Copy = BlockCopy<Traits>;
  const char* base = reinterpret_cast<const char*>(source);
  const bool aligned = !Traits::kFeatured || rows_aligned(target, stride);
  Copy::template for_each<kRows>(target, stride, [&](int r, int chunk, int offset, auto* to) {
    if (r < rows && chunk * 8 < head_dim) {
      store_chunk(to, *reinterpret_cast<const uint4*>(base + offset), aligned);
    }
  });
}

}  // namespace flash::v2
