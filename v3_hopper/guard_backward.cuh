// 0 x NaN is NaN: where some row must not see some key, keys that are not finite become zero before
// dQ = dS K. Rows that see a NaN become NaN by their LSE, the gradients of such keys at the end.
#pragma once

#include "common/mask.cuh"
#include "common/ptx.cuh"
#include "v3_hopper/softmax_backward.cuh"

namespace flash::v3 {

// Calls visit(16 bytes, row) for all of `rows` rows of a tile from `first`, a share per thread.
template <class Element, int kChunks, int kRows, class Visit>
__device__ __forceinline__ void for_each_piece(Element (&tile)[kChunks][kRows][kChunkColumns],
                                               int first, int rows, int threads, Visit visit) {
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll 4
    for (int i = threadIdx.x % threads; i < rows * 8; i += threads) {
      visit(reinterpret_cast<uint4*>(tile[chunk][first])[i], first + i / 8);
    }
  }
}

template <class Element>
__device__ __forceinline__ bool any_non_finite(const uint4& piece) {
  return flash::any_non_finite<Element>(piece.x) || flash::any_non_finite<Element>(piece.y) ||
         flash::any_non_finite<Element>(piece.z) || flash::any_non_finite<Element>(piece.w);
}

// sum += 0 * pair: NaN from the first element on that is not finite. One instruction for two.
template <class Element>
__device__ __forceinline__ void add_zero_times(uint32_t& sum, uint32_t pair) {
  if constexpr (std::is_same_v<Element, fp16>) {
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0));
  }
}

// Did any of the threads that meet at this barrier find something?
__device__ __forceinline__ bool any_at(int id, int threads, bool found) {
  uint32_t any;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.b32 p, %1, 0;\n"
      "barrier.cta.red.or.pred q, %2, %3, p;\nselp.b32 %0, 1, 0, q;\n}\n"
      : "=r"(any)
      : "r"(uint32_t(found)), "r"(id), "r"(threads)
      : "memory");
  return any != 0;
}

// Is any element of these rows NaN or infinite? `threads` threads share the rows.
template <class Element, int kChunks, int kRows>
__device__ __forceinline__ bool find_non_finite(Element (&tile)[kChunks][kRows][kChunkColumns],
                                                int first, int rows, int threads) {
  uint32_t sum = 0;  // of zeros, unless something is not finite
  for_each_piece(tile, first, rows, threads, [&](const uint4& piece, int) {
    add_zero_times<Element>(sum, piece.x);
    add_zero_times<Element>(sum, piece.y);
    add_zero_times<Element>(sum, piece.z);
    add_zero_times<Element>(sum, piece.w);
  });
  return flash::any_non_finite<Element>(sum);
}

// Zeroes every piece that is not finite; its row gets a bit of poison, if wanted.
template <class Element, int kChunks, int kRows>
__device__ __forceinline__ void remove_non_finite(Element (&tile)[kChunks][kRows][kChunkColumns],
                                                  int first, int rows, int threads,
                                                  uint32_t* poison) {
  for_each_piece(tile, first, rows, threads, [&](uint4& piece, int row) {
    if (!any_non_finite<Element>(piece)) return;
    piece = uint4{0, 0, 0, 0};
    if (poison != nullptr) atomicOr(poison + row / 32, 1u << row % 32);
  });
  fence_async_proxy();
}

// Keys as an operand in registers: elements that are not finite become zero.
template <class Element, int N>
__device__ __forceinline__ void remove_non_finite(uint32_t (&r)[N]) {
  constexpr uint32_t kLow = kExponentBits<Element>;
  constexpr uint32_t kHigh = kLow << 16;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if ((r[i] & kLow) == kLow) r[i] &= 0xffff0000u;
    if ((r[i] & kHigh) == kHigh) r[i] &= 0x0000ffffu;
  }
}

// The gradient of a key that was not finite is NaN: `key` and `key` + 8 are this thread's rows.
template <int N>
__device__ __forceinline__ void spoil(float (&d)[N], const uint32_t* poison, int key) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int mine = key + 8 * half;
    if ((poison[mine / 32] >> mine % 32 & 1) == 0) continue;
#pragma unroll
    for (int i = 2 * half; i < N; i += 4) d[i] = d[i + 1] = NAN;
  }
}

}  // namespace flash::v3
