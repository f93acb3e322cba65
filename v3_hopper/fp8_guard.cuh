// V that comes with its keys contiguous: where a row must not see some of it, NaN become zeros.
#pragma once

#include "v3_hopper/fp8_transpose.cuh"

namespace flash::v3::fp8 {

// One warp's share of a tile. Returns whether NaN was found; the first pass only looks.
template <class Traits>
__device__ __forceinline__ bool clean_columns(unsigned char* tile) {
  constexpr int kWords = Traits::kHeadDimV * kChunkBytes / 4, kStep = kTransposers * kWarp;
  auto* words = reinterpret_cast<uint32_t*>(tile);
  const int first = threadIdx.x - kWarp;
  uint32_t found = 0;
#pragma unroll 8
  for (int i = first; i < kWords; i += kStep) found |= nan_marks(words[i]);
  if (!__any_sync(~0u, (found & kMarks) != 0)) return false;
#pragma unroll 1
  for (int i = first; i < kWords; i += kStep) {
    const uint32_t marks = nan_marks(words[i]) & kMarks;
    words[i] &= ~((marks >> 7) * 0xffu);
  }
  return true;
}

// The life of a warp that looks for NaN: order after order, wait until V has landed, clean, hand
// over.
template <class Traits>
__device__ __forceinline__ void clean_all(typename Traits::Shared& shared) {
  for (Counter passed;; ++passed.passed) {
    const int from = passed.slot<Traits::kStagesRaw>();
    shared.raw_full[from].wait(passed.parity<Traits::kStagesRaw>());
    const Order& order = shared.orders[from];
    if (order.care == Care::kEnd) return;
    const int slot = order.v;
    const bool found = clean_columns<Traits>(shared.v[slot]);
    if (found && threadIdx.x % kWarp == 0) shared.work[order.work].poisoned = 1;
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) {
      shared.v_full[slot].arrive();
      shared.raw_empty[from].arrive();
    }
  }
}

}  // namespace flash::v3::fp8
