// The products of the backward pass over tiles in shared memory, chunks of 64 columns side by side.
#pragma once

#include "v3_hopper/traits_backward.cuh"

namespace flash::v3 {

inline constexpr int kSlabBytes = 32;            // 16 elements of a row: one wgmma deep
inline constexpr int kSlabRowsBytes = 16 * 128;  // 16 rows: one wgmma deep, operand transposed

// Scores, either way round: D (64, N) = A (64 rows from `row`, dim) B^T (N rows, dim). Chunks of A
// begin at every `kStepA`-th column.
template <int kDim, int kStepA = kChunkColumns, class Element, int kChunks, int kRowsA, int kRowsB>
__device__ __forceinline__ void gemm_scores(float (&d)[kRowsB / 2],
                                            const Element (&a)[kChunks][kRowsA][kChunkColumns],
                                            int row,
                                            const Element (&b)[kChunks][kRowsB][kChunkColumns],
                                            bool accumulate) {
  const uint64_t rows = descriptor_k(a[0][row]);
  const uint64_t columns = descriptor_k(b[0]);
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    constexpr int kSlabsA = kStepA / 16;
    const int at_a = i / kSlabsA * int(sizeof(a[0])) + i % kSlabsA * kSlabBytes;
    const int at_b = i / 4 * int(sizeof(b[0])) + i % 4 * kSlabBytes;
    wgmma<kRowsB>::template ss<Element>(d, advance(rows, at_a), advance(columns, at_b),
                                        accumulate || i > 0);
  }
}

// The first 64 rows of a tile as an operand in registers.
template <class Element, int N, int kChunks, int kRows>
__device__ __forceinline__ void load_operand(uint32_t (&r)[N],
                                             const Element (&tile)[kChunks][kRows][kChunkColumns]) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
  for (int slab = 0; slab < N / 4; ++slab) {
    const int piece = (slab % 4 * 2 + lane / 16) ^ row % 8;  // of 8 columns
    const uint32_t address = shared_address(&tile[slab / 4][row][piece * 8]);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[4 * slab]), "=r"(r[4 * slab + 1]), "=r"(r[4 * slab + 2]),
                   "=r"(r[4 * slab + 3])
                 : "r"(address)
                 : "memory");
  }
}

// Scores with the left operand in registers.
template <class Element, int kSlabs, int kChunks, int kRowsB>
__device__ __forceinline__ void gemm_scores(float (&d)[kRowsB / 2], const uint32_t (&a)[kSlabs],
                                            const Element (&b)[kChunks][kRowsB][kChunkColumns],
                                            bool accumulate) {
  const uint64_t columns = descriptor_k(b[0]);
#pragma unroll
  for (int i = 0; i < kSlabs / 4; ++i) {
    const int at = i / 4 * int(sizeof(b[0])) + i % 4 * kSlabBytes;
    wgmma<kRowsB>::template rs<Element>(d, a + 4 * i, advance(columns, at), accumulate || i > 0);
  }
}

// A gradient: D (64, dim) += A (64, kRows) from registers, B (kRows, dim).
template <class Element, int N, int kSlabs, int kChunks, int kRows>
__device__ __forceinline__ void gemm_gradient(float (&d)[N], const uint32_t (&a)[kSlabs],
                                              const Element (&b)[kChunks][kRows][kChunkColumns]) {
  static_assert(kSlabs == kRows / 4, "A and B must be equally deep");
  const uint64_t rows = descriptor_mn(b, sizeof(b[0]));
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
    wgmma<2 * N>::template rs<Element, Major::kMN>(d, a + 4 * i, advance(rows, i * kSlabRowsBytes),
                                                   true);
  }
}

// dK: D (64 keys, dim) += dS^T (64 keys from `key`, rows) Q (rows, dim).
template <class Element, int N, int kKeys, int kChunks, int kRows>
__device__ __forceinline__ void gemm_dk(float (&d)[N], const Element (&ds)[kKeys][kRows], int key,
                                        const Element (&q)[kChunks][kRows][kChunkColumns]) {
  const uint64_t keys = descriptor_k(ds[key]);
  const uint64_t rows = descriptor_mn(q, sizeof(q[0]));
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
    wgmma<2 * N>::template ss<Element, Major::kK, Major::kMN>(
        d, advance(keys, i * kSlabBytes), advance(rows, i * kSlabRowsBytes), true);
  }
}

// dQ: D (64 rows, N columns) = dS (rows, all keys) K (all keys, N columns of one chunk).
template <class Element, int N, int kKeys, int kRows>
__device__ __forceinline__ void gemm_dq(float (&d)[N], const Element (&ds)[kKeys][kRows],
                                        const Element (&k)[kKeys][kChunkColumns]) {
  const uint64_t rows = descriptor_mn(ds, 0);
  const uint64_t columns = descriptor_mn(k, 0);
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) {
    wgmma<2 * N>::template ss<Element, Major::kMN, Major::kMN>(
        d, advance(rows, i * kSlabRowsBytes), advance(columns, i * kSlabRowsBytes), i > 0);
  }
}

// dQ^T: D (64 dims, rows) = K^T (dims, all keys) from registers, dS^T (all keys, rows).
template <class Element, int N, int kSlabs, int kKeys, int kRows>
__device__ __forceinline__ void gemm_dq_transposed(float (&d)[N], const uint32_t (&k)[kSlabs],
                                                   const Element (&ds)[kKeys][kRows]) {
  static_assert(kSlabs == kKeys / 4 && kRows == kChunkColumns, "A and B must be equally deep");
  const uint64_t rows = descriptor_mn(ds, sizeof(ds));
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) {
    wgmma<2 * N>::template rs<Element, Major::kMN>(d, k + 4 * i, advance(rows, i * kSlabRowsBytes),
                                                   i > 0);
  }
}

}  // namespace flash::v3
