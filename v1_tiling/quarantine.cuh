// Values of V that are NaN or infinite reach the rows that see them, and no other: 0 times NaN is
// NaN.
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
    const uint32_t zero = 0;
    const Pair next = __hfma2(reinterpret_cast<const Pair&>(word),
                              reinterpret_cast<const Pair&>(zero), reinterpret_cast<Pair&>(sum));
    sum = reinterpret_cast<const uint32_t&>(next);
  }
  __device__ __forceinline__ bool any() const { return (sum & 0x7fff7fffu) != 0; }
};

template <class Element, class Rows>
__device__ __forceinline__ float load_element(uint32_t base, int row, int column) {
  const uint32_t word = load_shared_4(base + Rows::offset(row, column / 8) + column % 8 / 2 * 4);
  const float2 pair = unpack<Element>(word);
  return column % 2 == 0 ? pair.x : pair.y;
}

// Is any value of V_j not finite? Worth asking when some row does not see all of the block.
template <class Traits>
__device__ __forceinline__ bool find_poison(const Shared<Traits>& smem, int j) {
  using Rows = typename Traits::Rows;
  const int lane = opaque(threadIdx.x % 32);
  NonFinite<typename Traits::Part> found;
#pragma unroll 4
  for (int i = lane; i < Traits::kBlockKV * Rows::kChunks; i += 32) {
    uint32_t words[4];
    load_shared_16(words, smem.v(j) + i * 16);
#pragma unroll
    for (int w = 0; w < 4; ++w) found.look(words[w]);
  }
  return __any_sync(kFullWarp, found.any());
}

// Adds those values, if there are any, to the rows that see their keys. The product that follows
// must then take them for 0.
template <class Traits>
__device__ __forceinline__ bool quarantine(typename Traits::Output& O, const Shared<Traits>& smem,
                                           const Tile<Traits>& tile, int j) {
  if (!find_poison(smem, j)) return false;
  using Element = typename Traits::Part;  // of fp32, the high part says what it is
  using Rows = typename Traits::Rows;
  const int lane = opaque(threadIdx.x % 32);
#pragma unroll 1
  for (int key = 0; key < Traits::kBlockKV; ++key) {
#pragma unroll
    for (int n = 0; n < Traits::kTilesV; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = n * 8 + lane % 4 * 2 + half;
        const float v = load_element<Element, Rows>(smem.v(j), key, column);
        if (isfinite(v)) continue;
#pragma unroll
        for (int m = 0; m < Traits::kTilesQ; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = tile.warp_row + m * 16 + h * 8 + lane / 4;
            const bool seen = tile.sequence.visible(row, j * Traits::kBlockKV + key);
            if (seen) O[m][n][2 * h + half] += v;
          }
        }
      }
    }
  }
  return true;
}

}  // namespace flash::v1
