// Rows of 16-bit elements in shared memory, permuted so that loads of matrix fragments, 16-byte
// copies and stores of accumulators each touch every bank once.
#pragma once

#include <cstdint>

namespace flash {

// A chunk is 16 bytes, 8 elements. Bases are 128-byte aligned.
template <int kDim>
struct SwizzledRows {
  static_assert(kDim % 32 == 0, "rows end on a chunk permutation");
  static constexpr int kRowBytes = kDim * 2;
  static constexpr int kChunks = kDim / 8;
  // Chunks that change places among themselves: 8 when one row fills all banks, else 4.
  static constexpr int kSpan = kDim % 64 == 0 ? 8 : 4;

  static constexpr __host__ __device__ __forceinline__ int offset(int row, int chunk) {
    const int permutation = kSpan == 8 ? row & 7 : (row >> 1) & 3;
    return row * kRowBytes + ((chunk ^ permutation) << 4);
  }

  // From the address of chunk c to that of chunk c + n of the same row; c and n share no bits.
  static __device__ __forceinline__ uint32_t advance(uint32_t address, int n) {
    return (address ^ ((n % kSpan) << 4)) + (n / kSpan) * (kSpan * 16);
  }
};

}  // namespace flash
