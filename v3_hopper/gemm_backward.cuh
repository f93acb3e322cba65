// The five products of the backward pass; a warpgroup owns 64 keys of dK and dV.
#pragma once

#include "v3_hopper/traits_backward.cuh"

namespace flash::v3 {

inline constexpr int kSlabBytes = 32;            // 16 elements of a row: one wgmma deep
inline constexpr int kSlabRowsBytes = 16 * 128;  // 16 rows: one wgmma deep, operand transposed

// Scores, transposed: D (64 keys, 64 rows) = A (64 keys, dim) B^T (64 rows, dim).
template <class Traits>
__device__ __forceinline__ void gemm_scores(float (&d)[Traits::kBlockQ / 2],
                                            const typename Traits::TileKV& a, int key,
                                            const typename Traits::TileQ& b, bool accumulate) {
  const uint64_t keys = descriptor_k(a[0][key]);
  const uint64_t rows = descriptor_k(b[0]);
#pragma unroll
  for (int i = 0; i < Traits::kHeadDim / 16; ++i) {
    const int chunk = i / 4;
    const int within = i % 4 * kSlabBytes;
    wgmma<Traits::kBlockQ>::template ss<typename Traits::Element>(
        d, advance(keys, chunk * int(sizeof(a[0])) + within),
        advance(rows, chunk * int(sizeof(b[0])) + within), accumulate || i > 0);
  }
}

// dV: D (64 keys, dim) += P^T (64 keys, 64 rows) from registers, dO (64 rows, dim).
template <class Traits>
__device__ __forceinline__ void gemm_dv(float (&d)[Traits::kHeadDim / 2],
                                        const uint32_t (&p)[Traits::kBlockQ / 4],
                                        const typename Traits::TileQ& dout) {
  const uint64_t rows = descriptor_mn(dout, sizeof(dout[0]));
#pragma unroll
  for (int i = 0; i < Traits::kBlockQ / 16; ++i) {
    wgmma<Traits::kHeadDim>::template rs<typename Traits::Element, Major::kMN>(
        d, p + 4 * i, advance(rows, i * kSlabRowsBytes), true);
  }
}

// dK: D (64 keys, dim) += dS^T (64 keys, 64 rows) Q (64 rows, dim).
template <class Traits>
__device__ __forceinline__ void gemm_dk(float (&d)[Traits::kHeadDim / 2],
                                        const typename Traits::TileDS& ds, int key,
                                        const typename Traits::TileQ& q) {
  const uint64_t keys = descriptor_k(ds[key]);
  const uint64_t rows = descriptor_mn(q, sizeof(q[0]));
#pragma unroll
  for (int i = 0; i < Traits::kBlockQ / 16; ++i) {
    wgmma<Traits::kHeadDim>::template ss<typename Traits::Element, Major::kK, Major::kMN>(
        d, advance(keys, i * kSlabBytes), advance(rows, i * kSlabRowsBytes), true);
  }
}

// dQ: D (64 rows, this warpgroup's columns) = dS (64 rows, all keys) K (all keys, columns).
template <class Traits>
__device__ __forceinline__ void gemm_dq(float (&d)[Traits::kColumnsDQ / 2],
                                        const typename Traits::TileDS& ds,
                                        const typename Traits::TileKV& k, int column) {
  const uint64_t rows = descriptor_mn(ds, 0);
  const uint64_t columns =
      descriptor_mn(&k[column / kChunkColumns][0][column % kChunkColumns], sizeof(k[0]));
#pragma unroll
  for (int i = 0; i < Traits::kBlockKV / 16; ++i) {
    wgmma<Traits::kColumnsDQ>::template ss<typename Traits::Element, Major::kMN, Major::kMN>(
        d, advance(rows, i * kSlabRowsBytes), advance(columns, i * kSlabRowsBytes), i > 0);
  }
}

}  // namespace flash::v3
