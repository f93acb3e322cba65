// V (keys, dv) -> V (dv, keys), which the FP8 product needs, by two warps of the producer; keys are
// put in the order in which the accumulators of S hold them, so P is an operand as it stands.
#pragma once

#include "v3_hopper/fp8_traits.cuh"
#include "v3_hopper/schedule.cuh"

namespace flash::v3::fp8 {

// The rows below V, read as columns of P V: the first one gives the sums of P. All threads.
template <class Traits>
__device__ __forceinline__ void write_ones(typename Traits::Shared& shared) {
  constexpr int kWords = Traits::kSumColumns * kChunkBytes / 4, kRowWords = kChunkBytes / 4;
  constexpr uint32_t kOnes = 0x38383838;  // four times 1.0
  for (int i = threadIdx.x; i < Traits::kStages * kWords; i += Traits::kThreads) {
    auto* rows =
        reinterpret_cast<uint32_t*>(shared.v[i / kWords] + Traits::kHeadDimV * kChunkBytes);
    rows[i % kWords] = i % kWords < kRowWords ? kOnes : 0u;
  }
  fence_async_proxy();
}

// 0xff in every byte that is NaN; e4m3 has no Inf.
__device__ __forceinline__ uint32_t nan_bytes(uint32_t x) {
  const uint32_t is_nan = ((x & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
  return (is_nan >> 7) * 0xffu;
}

// Where one thread reads and writes: 32 keys x 16 columns per step.
//
// A transposed load gives a thread keys 2c, 2c + 1 of columns 2j, 2j + 1 (j = lane / 4, c = lane %
// 4) out of each 8 keys. Four bytes for one column, keys 2c, 2c + 1, 2c + 8, 2c + 9, are what a
// thread of the product holds of P. The upper half of the warp takes its odd column first, so that
// the eight rows of a store lie in different banks.
struct Transposer {
  uint32_t source, target;  // shared addresses of step 0
  uint32_t first, second;   // byte selectors of the two columns

  __device__ __forceinline__ Transposer(const unsigned char* raw, unsigned char* v) {
    const int lane = threadIdx.x % kWarp, row = lane % 8, tile = lane / 8;
    source = shared_address(raw) + (tile * 8 + row) * kChunkBytes + row * 16;
    const int column = 2 * row + ((tile & 1) ^ (row >= 4 ? 1 : 0));
    target = shared_address(v) + column * kChunkBytes + ((tile / 2) ^ (column % 8)) * 16;
    first = lane < 16 ? 0x6420 : 0x7531;
    second = lane < 16 ? 0x7531 : 0x6420;
  }

  // Keys [32 step, 32 step + 32) of columns [16 segment, 16 segment + 16).
  template <int kBlockKV>
  __device__ __forceinline__ void load(uint32_t (&x)[4], int segment, int step) const {
    const uint32_t at =
        (source ^ (segment % 8 * 16)) + (segment / 8 * kBlockKV + step * 32) * kChunkBytes;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
  }
  __device__ __forceinline__ void store(const uint32_t (&x)[4], int segment, int step) const {
    const uint32_t at = (target ^ (step * 32)) + segment * 16 * kChunkBytes;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(__byte_perm(x[0], x[1], first)), "r"(__byte_perm(x[0], x[1], second)),
                 "r"(__byte_perm(x[2], x[3], first)), "r"(__byte_perm(x[2], x[3], second))
                 : "memory");
  }
};

// Rows from `keys` on become zero, and so do NaN, which are reported. `x` is four times 8 keys.
__device__ __forceinline__ bool clean(uint32_t (&x)[4], int keys) {
  bool found = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key = 8 * i + threadIdx.x % 4 * 2;
    x[i] &= key + 1 < keys ? ~0u : key < keys ? 0xffffu : 0u;
    const uint32_t bad = nan_bytes(x[i]);
    found |= bad != 0;
    x[i] &= ~bad;
  }
  return found;
}

// One warp's share of a tile, with `keys` rows that count. Returns whether NaN was found.
template <class Traits, bool kGuarded>
__device__ __forceinline__ bool transpose(const unsigned char* raw, unsigned char* v, int keys,
                                          int warp) {
  const Transposer transposer(raw, v);
  constexpr int kSegments = Traits::kHeadDimV / 16, kSteps = Traits::kBlockKV / 32;
  constexpr int kAtOnce = kGuarded ? 1 : 2;
  bool found = false;
#pragma unroll 1
  for (int segment = warp; segment < kSegments; segment += kGuardWarps) {
#pragma unroll(kGuarded ? 1 : kSteps / kAtOnce)
    for (int step = 0; step < kSteps; step += kAtOnce) {
      uint32_t x[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        transposer.template load<Traits::kBlockKV>(x[i], segment, step + i);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (kGuarded) found |= clean(x[i], keys - 32 * (step + i));
        transposer.store(x[i], segment, step + i);
      }
    }
  }
  return kGuarded && __any_sync(~0u, found);
}

// One block: wait until V has landed and a slot is free, transpose, hand over.
template <class Traits>
__device__ __forceinline__ void transpose_block(const Arguments& args,
                                                typename Traits::Shared& shared, Work& work,
                                                int key, Counter block) {
  const int warp = threadIdx.x / kWarp - kGuards;
  const int raw_slot = block.slot<Traits::kStagesRaw>(), slot = block.slot<Traits::kStages>();
  if (threadIdx.x % kWarp == 0 && warp == 0) {
    const float descale = descale_of(args.p.v_descale, work.index, key, work.head_kv);
    shared.v_empty[slot].wait(block.parity<Traits::kStages>() ^ 1);
    shared.v_descale[slot] = descale;
  }
  shared.raw_full[raw_slot].wait(block.parity<Traits::kStagesRaw>());
  shared.v_empty[slot].wait(block.parity<Traits::kStages>() ^ 1);
  const bool packed = args.p.cu_seqlens_k != nullptr;
  if (!needs_guard<Traits>(work, key / Traits::kBlockKV, packed)) {
    transpose<Traits, false>(shared.raw[raw_slot], shared.v[slot], Traits::kBlockKV, warp);
  } else if (transpose<Traits, true>(shared.raw[raw_slot], shared.v[slot],
                                     work.sequence.seqlen_k - key, warp)) {
    work.poisoned = 1;
  }
  fence_async_proxy();
  __syncwarp();
  if (threadIdx.x % kWarp == 0) {
    shared.v_full[slot].arrive();
    shared.raw_empty[raw_slot].arrive();
  }
}

// The life of a transposing warp.
template <class Traits>
__device__ __forceinline__ void transpose_all(const Arguments& args,
                                              typename Traits::Shared& shared) {
  Counter tile, block;
  for (;; ++tile.passed) {
    const int slot = tile.slot<Traits::kWorkSlots>();
    shared.work_full[slot].wait(tile.parity<Traits::kWorkSlots>());
    Work& work = shared.work[slot];
    if (work.head < 0) return;
    const Range blocks = key_blocks<Traits>(work);
#pragma unroll 1
    for (int at = blocks.end - 1; at >= blocks.begin; --at, ++block.passed) {
      transpose_block<Traits>(args, shared, work, at * Traits::kBlockKV, block);
    }
    __syncwarp();
    if (threadIdx.x % kWarp == 0) shared.work_empty[slot].arrive();
  }
}

}  // namespace flash::v3::fp8
