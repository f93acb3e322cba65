// Values of V that are NaN or infinite reach the rows that see them, and no other: 0 times NaN is NaN.
#pragma once

#include "common/reduce.cuh"
#include "v1_tiling/gemm.cuh"

namespace flash::v1 {

// Whether any of many elements is NaN or infinite: 0 times such a value is NaN, and so is every sum
// from then on.
template <class Element>
struct NonFinite {
  using Pair = std::conditional_t<std::is_same_v<Element, fp16>, __half2, __nv_bfloat162>;
  uint32_t sum = 0;

  __device__ __forceinline__ void look(uint32_t word) {
    if constexpr (sizeof(Element) == 4) {
      sum = __float_as_uint(fmaf(__uint_as_float(word), 0.0f, __uint_as_float(sum)));
    } else {
      const uint32_t zero = 0;
      const Pair next = __hfma2(reinterpret_cast<const Pair&>(word),
                                reinterpret_cast<const Pair&>(zero), reinterpret_cast<Pair&>(sum));
      sum = reinterpret_cast<const uint32_t&>(next);
    }
  }
  __device__ __forceinline__ bool any() const { return (sum & 0x7fff7fffu) != 0; }
};

// Two neighbouring elements of a row in shared memory.
template <class Element>
__device__ __forceinline__ float2 load_pair(uint32_t address) {
  if constexpr (sizeof(Element) == 4) {
    return {__uint_as_float(load_shared_4(address)), __uint_as_float(load_shared_4(address + 4))};
  } else {
    return unpack<Element>(load_shared_4(address));
  }
}

// Is any value of V_j not finite? Worth asking when some row does not see all of the block.
template <class Traits>
__device__ __forceinline__ bool poisoned(const Shared<Traits>& smem, int j) {
  using Rows = typename Traits::Rows;
  const int lane = opaque(threadIdx.x % 32);
  NonFinite<typename Traits::Element> found;
#pragma unroll 4
  for (int i = lane; i < Traits::kBlockKV * Rows::kChunks; i += 32) {
    uint32_t words[4];
    load_shared_16(words, smem.v(j) + i * 16);
#pragma unroll
    for (int w = 0; w < 4; ++w) found.look(words[w]);
  }
  return __any_sync(kFullWarp, found.any());
}

// O += P V_j, where a value that is not finite is added once to each row that sees it, instead of
// being multiplied.
template <class Traits>
__device__ __forceinline__ void gemm_pv_poisoned(typename Traits::Output& O,
                                                 const typename Traits::Scores& P,
                                                 Shared<Traits>& smem, const Tile<Traits>& tile,
                                                 int j) {
  using Element = typename Traits::Element;
  using Rows = typename Traits::Rows;
  const int lane = opaque(threadIdx.x % 32);
#pragma unroll 1
  for (int key = 0; key < Traits::kBlockKV; ++key) {
#pragma unroll
    for (int n = 0; n < Traits::kTilesV; ++n) {
      const int column = (n * 8 + lane % 4 * 2) * int(sizeof(Element));  // in bytes
      const float2 v =
          load_pair<Element>(smem.v(j) + Rows::offset(key, column / 16) + column % 16);
      if (isfinite(v.x) && isfinite(v.y)) continue;
#pragma unroll
      for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = tile.warp_row + m * 16 + e / 2 * 8 + lane / 4;
          const float value = e % 2 == 0 ? v.x : v.y;
          const bool seen = tile.sequence.visible(row, j * Traits::kBlockKV + key);
          if (seen && !isfinite(value)) O[m][n][e] += value;
        }
      }
    }
  }
  gemm_pv<Traits, true>(O, P, smem, j);
}

}  // namespace flash::v1
