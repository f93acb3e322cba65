// 0 x NaN is NaN: on the few blocks where some row must not see some row of V, guards replace NaN
// and Inf by zero before the matrix product, and the rows that do see them get them back at the
// end.
#pragma once

#include "v3_hopper/schedule.cuh"

namespace flash::v3 {

// NaN if either of two packed elements is NaN or Inf, else 0: x * 0.
template <class Element>
__device__ __forceinline__ uint32_t fold_not_finite(uint32_t pair, uint32_t folded) {
  uint32_t result;
  if constexpr (kDType<Element> == DType::kBFloat16) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(0u), "r"(folded));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(0u), "r"(folded));
  }
  return result;
}
template <class Element>
__device__ __forceinline__ uint32_t keep_finite(uint32_t pair) {
  const uint32_t folded = fold_not_finite<Element>(pair, 0u) & 0x7fff7fffu;
  return pair & ((folded & 0xffffu ? 0u : 0xffffu) | (folded >> 16 ? 0u : 0xffff0000u));
}

// One guard warp looks through its share of a V tile, where some row must not see some of it: NaN
// and Inf become zero, and so do rows behind the last key. Returns whether any was found before
// them. The first pass only looks, which is all that most need.
template <class Traits>
__device__ __forceinline__ bool clean_v(unsigned char* tile, int keys, bool looks, int guard) {
  using Element = typename Traits::Element;
  constexpr int kRowVectors = kChunkBytes / 16;
  constexpr int kVectors = Traits::kBytesV / 16, kStep = kGuardWarps * kWarp;
  constexpr int kRounds = kVectors / kStep;
  constexpr int kBatch = kRounds % 8 == 0 ? 8 : kRounds % 7 == 0 ? 7 : 6;  // none is conditional
  static_assert(kVectors == kRounds * kStep && kRounds % kBatch == 0);
  auto* vectors = reinterpret_cast<uint4*>(tile);
  const int first = guard * kWarp + threadIdx.x % kWarp;
  uint4 folded = {0, 0, 0, 0};
#pragma unroll 1
  for (int batch = looks ? first : kVectors; batch < kVectors; batch += kBatch * kStep) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint4 x = vectors[batch + i * kStep];
      folded.x = fold_not_finite<Element>(x.x, folded.x);
      folded.y = fold_not_finite<Element>(x.y, folded.y);
      folded.z = fold_not_finite<Element>(x.z, folded.z);
      folded.w = fold_not_finite<Element>(x.w, folded.w);
    }
  }
  const uint32_t any = (folded.x | folded.y | folded.z | folded.w) & 0x7fff7fffu;
  if (!__any_sync(~0u, any != 0)) {
#pragma unroll 4
    for (int at = first; at < kVectors && keys < Traits::kBlockKV; at += kStep) {
      if (at / kRowVectors % Traits::kBlockKV >= keys) vectors[at] = {0, 0, 0, 0};
    }
    return false;
  }
  bool found = false;
#pragma unroll 1
  for (int at = first; at < kVectors; at += kStep) {
    const uint4 x = vectors[at];
    const uint4 kept = {keep_finite<Element>(x.x), keep_finite<Element>(x.y),
                        keep_finite<Element>(x.z), keep_finite<Element>(x.w)};
    const bool behind = at / kRowVectors % Traits::kBlockKV >= keys;
    const bool same = kept.x == x.x && kept.y == x.y && kept.z == x.z && kept.w == x.w;
    found |= !behind && !same;
    vectors[at] = behind ? uint4{0, 0, 0, 0} : kept;
  }
  return __any_sync(~0u, found);
}

// The life of a guard: of every block that needs one, wait until it has landed, clean, hand over.
template <class Traits>
__device__ __forceinline__ void guard(const Arguments& args, typename Traits::Shared& shared) {
  const int guard = threadIdx.x / kWarp - kGuards;
  const bool leader = threadIdx.x % kWarp == 0;
  Ring<Traits::kWorkSlots> slot;
  Ring<Traits::kStages> v;
  uint32_t landed_parity = 0;  // bit s: parity of slot s, which flips only when it is used
  for (;; slot.advance()) {
    shared.work_full[slot.slot].wait(slot.parity);
    Work& work = shared.work[slot.slot];
    if (work.head < 0) return;
    const Range blocks = key_blocks<Traits>(work);
    for (int block = blocks.end - 1; block >= blocks.begin; --block, v.advance()) {
      if (work.unguarded.holds(block)) continue;
      shared.v_landed[v.slot].wait(landed_parity >> v.slot & 1);
      landed_parity ^= 1u << v.slot;
      const int key = block * Traits::kBlockKV, keys = work.sequence.seqlen_k - key;
      const bool looks =
          !work.sequence.all_visible(work.row, Traits::kBlockQ, key, min(Traits::kBlockKV, keys));
      const bool found = clean_v<Traits>(shared.v[v.slot], keys, looks, guard);
      if (found && leader) work.poisoned = 1;
      fence_async_proxy();
      __syncwarp();
      if (leader) shared.v_full[v.slot].arrive();
    }
    __syncwarp();
    if (leader) shared.work_empty[slot.slot].arrive();
  }
}

// Adds every NaN and Inf of V that a row sees to that row of the output, which one consumer has
// just written: rows [row, row + kGroupRows) of the sequence.
template <class Traits>
__device__ __forceinline__ void restore_poison(const ForwardParams& p, const Work& work, int row,
                                               int64_t key_stride, int64_t column_stride = 1) {
  const Sequence& sequence = work.sequence;
  const auto* gV = static_cast<const typename Traits::Element*>(p.v.data) + work.batch * p.v.batch +
                   sequence.row_k * key_stride + work.head_kv * p.v.head;
  auto* gO = static_cast<typename Traits::Output*>(p.o.data) + work.batch * p.o.batch +
             sequence.row_q * p.o.row + work.head * p.o.head;
  const int end_row = min(row + kGroupRows, sequence.seqlen_q);
  const Range keys = sequence.keys(row, kGroupRows);
#pragma unroll 1
  for (int column = threadIdx.x % kGroupThreads; column < p.head_dim_v; column += kGroupThreads) {
#pragma unroll 1
    for (int key = keys.begin; key < keys.end; ++key) {
      const float value = float(gV[key * key_stride + column * column_stride]);
      if (fabsf(value) < INFINITY) continue;
#pragma unroll 1
      for (int r = row; r < end_row; ++r) {
        auto& o = gO[r * p.o.row + column];
        if (sequence.visible(r, key)) o = typename Traits::Output(float(o) + value);
      }
    }
  }
}

}  // namespace flash::v3
