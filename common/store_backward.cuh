// Backward, registers to memory: shares of dQ are added, dK and dV are stored.
#pragma once

#include "common/load_backward.cuh"

namespace flash {

// This lane's first element in a tile of dQ.
__device__ __forceinline__ uint32_t fragment_offset(int lane) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return lane * 4;
#else
  return lane;
#endif
}

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

// Reads such a tile.
__device__ __forceinline__ float4 load_fragment(const float* tile, int lane) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return reinterpret_cast<const float4*>(tile)[lane];
#else
  return {tile[lane], tile[32 + lane], tile[64 + lane], tile[96 + lane]};
#endif
}

// Adds tile i of this warp's share of one pass; `target` is its first tile in the block.
template <class Traits>
__device__ __forceinline__ void add_dq(
    float* target, const float (&rdQ)[Traits::kDqRows / 16][Traits::kDqPassDim / 8][4], int pass,
    int i, int lane) {
  constexpr int kRowTiles = Traits::kDqRows / 16, kColumns = Traits::kDqPassDim / 16;
  const int m = i % kRowTiles, n = i / kRowTiles;
  const int chunk = (pass * kColumns + n / 2) * Traits::kDqWarpsDim * 2 + n % 2;
  add_fragment(target + (m * (Traits::kHeadDim / 8) + chunk) * 128, rdQ[m][n], lane);
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

// dK and dV of this CTA's key block, through the places of K and V.
template <class Traits>
__device__ __forceinline__ void store_keys(typename Traits::Shared& shared, const BackwardParams& p,
                                           const float (&rdK)[2][Traits::kWarpDim / 8][4],
                                           const float (&rdV)[2][Traits::kWarpDim / 8][4], int key,
                                           int slice, int lane) {
  using Element = typename Traits::Element;
  const auto& tile = shared.tile;
  __syncthreads();  // K and V are no longer read
  stage_keys<Traits>(shared.k, rdK, p.scale, key, slice, lane);
  stage_keys<Traits>(shared.v, rdV, 1.0f, key, slice, lane);
  __syncthreads();  // dK and dV are staged
  const int64_t first = tile.sequence.row_k;
  const int rows = tile.sequence.seqlen_k - tile.key;
  store_block<Traits, Traits::kBlockKV>(
      row_of<Element>(p.dk, tile.batch, first, tile.head, tile.key), p.dk.row, rows, p.head_dim,
      shared.k);
  store_block<Traits, Traits::kBlockKV>(
      row_of<Element>(p.dv, tile.batch, first, tile.head, tile.key), p.dv.row, rows, p.head_dim_v,
      shared.v);
}

}  // namespace flash
