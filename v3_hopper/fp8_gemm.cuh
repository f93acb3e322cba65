// S = Q K^T and one part of P V in FP8, issued as asynchronous warpgroup instructions.
#pragma once

#include "v3_hopper/fp8_traits.cuh"

namespace flash::v3::fp8 {

// S (64, kBlockKV) = Q (64, d) K^T (d, kBlockKV), both from shared memory.
template <class Traits>
__device__ __forceinline__ void gemm_qk(float (&s)[Traits::kBlockKV / 2], const unsigned char* q,
                                        const unsigned char* k) {
  const uint64_t a = descriptor_k(q), b = descriptor_k(k);
  pin(s);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < Traits::kHeadDim / 32; ++step) {
    const int chunk = step / 4, inside = step % 4 * 32;
    wgmma<Traits::kBlockKV>::template ss<e4m3>(
        s, advance(a, chunk * kGroupRows * kChunkBytes + inside),
        advance(b, chunk * Traits::kBlockKV * kChunkBytes + inside), step > 0);
  }
  wgmma_commit();
}

// (64, kColumns) = P (64, kBlockKV) V (kBlockKV, kColumns): P from registers, the columns that
// begin at row kFirst of the transposed V.
template <class Traits, int kFirst, int kColumns>
__device__ __forceinline__ void gemm_pv(float (&part)[kColumns / 2],
                                        uint32_t (&p)[Traits::kBlockKV / 8],
                                        const unsigned char* v) {
  const uint64_t b = descriptor_k(v + kFirst * kChunkBytes);
  pin(part);
  pin(p);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < Traits::kBlockKV / 32; ++step) {
    wgmma<kColumns>::template rs<e4m3>(part, p + 4 * step, advance(b, step * 32), step > 0);
  }
  wgmma_commit();
}

}  // namespace flash::v3::fp8
