// S = Q K^T and O += P V, issued as asynchronous warpgroup instructions; both return at once.
#pragma once

#include "v3_hopper/traits.cuh"

namespace flash::v3 {

// S (64, kBlockKV) = Q (64, d) K^T (d, kBlockKV), both from shared memory.
template <class Traits>
__device__ __forceinline__ void gemm_qk(float (&s)[Traits::kBlockKV / 2], const unsigned char* q,
                                        const unsigned char* k) {
  using Element = typename Traits::Element;
  const uint64_t a = descriptor_k(q), b = descriptor_k(k);
  pin(s);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
    const int chunk = step / 4, inside = step % 4 * 32;
    wgmma<Traits::kBlockKV>::template ss<Element>(
        s, advance(a, chunk * kGroupRows * kChunkBytes + inside),
        advance(b, chunk * Traits::kBlockKV * kChunkBytes + inside), step > 0);
  }
  wgmma_commit();
}

// O (64, dv) += P (64, kBlockKV) V (kBlockKV, dv), P from registers.
template <class Traits>
__device__ __forceinline__ void gemm_pv(float (&o)[Traits::kHeadDimV / 2],
                                        uint32_t (&p)[Traits::kBlockKV / 4],
                                        const unsigned char* v) {
  using Element = typename Traits::Element;
  const uint64_t b = descriptor_mn(v, Traits::kBlockKV * kChunkBytes);
  pin(o);
  pin(p);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < Traits::kBlockKV / 16; ++step) {
    wgmma<Traits::kHeadDimV>::template rs<Element, Major::kMN>(o, p + 4 * step,
                                                               advance(b, step * 2048), true);
  }
  wgmma_commit();
}

}  // namespace flash::v3
