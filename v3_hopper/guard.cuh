// 0 x NaN is NaN: on the few blocks where some row must not see some row of V, guards replace NaN
// and Inf by zero before the matrix product, and the rows that do see them get them back at the
// end.
#pragma once

#include "v3_hopper/schedule.cuh"

namespace flash::v3 {

// Exponent bits of two packed 16-bit elements all ones: NaN or Inf.
template <class Element>
__device__ __forceinline__ bool low_not_finite(uint32_t pair) {
  constexpr uint32_t kExponent = kDType<Element> == DType::kBFloat16 ? 0x7f80u : 0x7c00u;
  return (pair & kExponent) == kExponent;
}
template <class Element>
__device__ __forceinline__ uint32_t keep_finite(uint32_t pair) {
  return (low_not_finite<Element>(pair) ? 0u : pair & 0xffffu) |
         (low_not_finite<Element>(pair >> 16) ? 0u : pair & 0xffff0000u);
}

// One guard warp looks through its share of a V tile: rows behind the last key become zero, NaN and
// Inf too. Returns whether any was found.
template <class Traits>
__device__ __forceinline__ bool clean_v(unsigned char* tile, int keys, int guard) {
  constexpr int kVectors = Traits::kBytesV / 16;
  bool found = false;
  for (int i = guard * kWarp + threadIdx.x % kWarp; i < kVectors; i += kGuardWarps * kWarp) {
    uint4& vector = reinterpret_cast<uint4*>(tile)[i];
    const uint4 given = vector;
    const int row = i / (kChunkBytes / 16) % Traits::kBlockKV;
    using E = typename Traits::Element;
    const uint4 kept = {keep_finite<E>(given.x), keep_finite<E>(given.y), keep_finite<E>(given.z),
                        keep_finite<E>(given.w)};
    const bool changed =
        kept.x != given.x || kept.y != given.y || kept.z != given.z || kept.w != given.w;
    if (row >= keys) {
      vector = {0, 0, 0, 0};
    } else if (changed) {
      vector = kept;
      found = true;
    }
  }
  return __any_sync(~0u, found);
}

// The life of a guard: of every block that needs one, wait until it has landed, clean, hand over.
template <class Traits>
__device__ __forceinline__ void guard(const Arguments& args, typename Traits::Shared& shared) {
  const int guard = threadIdx.x / kWarp - 1;
  const bool leader = threadIdx.x % kWarp == 0;
  const bool packed = args.p.cu_seqlens_k != nullptr;
  Ring<Traits::kWorkSlots> slot;
  Ring<Traits::kStages> v;
  uint32_t landed_parity = 0;  // bit s: parity of slot s, which flips only when it is used
  for (;; slot.advance()) {
    shared.work_full[slot.slot].wait(slot.parity);
    Work& work = shared.work[slot.slot];
    if (work.head < 0) return;
    const Range blocks = key_blocks<Traits>(work);
    for (int block = blocks.end - 1; block >= blocks.begin; --block, v.advance()) {
      if (!needs_guard<Traits>(work, block, packed)) continue;
      shared.v_landed[v.slot].wait(landed_parity >> v.slot & 1);
      landed_parity ^= 1u << v.slot;
      const int keys = work.sequence.seqlen_k - block * Traits::kBlockKV;
      if (clean_v<Traits>(shared.v[v.slot], keys, guard)) work.poisoned = 1;
      fence_async_proxy();
      __syncwarp();
      if (leader) shared.v_full[v.slot].arrive();
    }
    __syncwarp();
    if (leader) shared.work_empty[slot.slot].arrive();
  }
}

// Adds every NaN and Inf of V that a row sees to that row of the normalized output.
template <class Traits>
__device__ __forceinline__ void restore_poison(const ForwardParams& p, const Work& work, int row,
                                               float (&o)[Traits::kHeadDimV / 2]) {
  using Element = typename Traits::Element;
  const Sequence& sequence = work.sequence;
  const int head_kv = work.head / (p.heads_q / p.heads_kv);
  const Element* v = static_cast<const Element*>(p.v.data) + head_kv * p.v.head +
                     (p.cu_seqlens_k ? 0 : work.batch) * p.v.batch + sequence.row_k * p.v.row;
  const Range keys = sequence.keys(work.row, Traits::kBlockQ);
  const int lane_column = threadIdx.x % 4 * 2;
  for (int key = keys.begin; key < keys.end; ++key) {
#pragma unroll
    for (int i = 0; i < Traits::kHeadDimV / 2; ++i) {
      const int column = i / 4 * 8 + lane_column + i % 2;
      if (column >= p.head_dim_v) continue;
      const float value = float(v[key * p.v.row + column]);
      const bool finite = fabsf(value) < INFINITY;
      if (!finite && sequence.visible(row + i / 2 % 2 * 8, key)) o[i] += value;
    }
  }
}

}  // namespace flash::v3
