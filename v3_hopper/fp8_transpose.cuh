// V (keys, dv) -> V (dv, keys), which the FP8 product needs, by three warps of the producer; keys
// are put in the order in which the accumulators of S hold them, so P is an operand as it stands.
#pragma once

#include "v3_hopper/fp8_traits.cuh"
#include "v3_hopper/schedule.cuh"

namespace flash::v3::fp8 {

// The rows below V, read as columns of P V: they give the sums of P. All threads.
template <class Traits>
__device__ __forceinline__ void write_ones(typename Traits::Shared& shared) {
  constexpr int kWords = Traits::kSumColumns * kChunkBytes / 4, kRowWords = kChunkBytes / 4;
  constexpr uint32_t kOnes = 0x38383838;  // four times 1.0
  for (int i = threadIdx.x; i < Traits::kStages * kWords; i += Traits::kThreads) {
    auto* rows =
        reinterpret_cast<uint32_t*>(shared.v[i / kWords] + Traits::kHeadDimV * kChunkBytes);
    rows[i % kWords] = Traits::kLean || i % kWords < kRowWords ? kOnes : 0u;
  }
  fence_async_proxy();
}

// The highest bit of every byte that is NaN (e4m3 has no Inf), and others that are not in kMarks.
constexpr uint32_t kMarks = 0x80808080u;
__device__ __forceinline__ uint32_t nan_marks(uint32_t x) {
  return (x & 0x7f7f7f7fu) + 0x01010101u;
}

// Where one thread reads and writes in a tile: 32 keys x 16 columns per step.
//
// A transposed load gives a thread keys 2c, 2c + 1 of columns 2j, 2j + 1 (j = lane / 4, c = lane %
// 4) out of each 8 keys. Four bytes for one column, keys 2c, 2c + 1, 2c + 8, 2c + 9, are what a
// thread of the product holds of P. The upper half of the warp takes its odd column first, so that
// the eight rows of a store lie in different banks.
struct Lane {
  uint32_t source, target;  // bytes from the beginning of the tile, at step 0
  uint32_t selector;        // the bytes of the first column; the second column's differ by 0x1111

  // Worked out anew for every tile: the producer has few registers to keep things in.
  __device__ __forceinline__ Lane() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    const int row = lane % 8, tile = lane / 8;
    source = (tile * 8 + row) * kChunkBytes + row * 16;
    const int column = 2 * row + ((tile & 1) ^ (row >= 4 ? 1 : 0));
    target = column * kChunkBytes + ((tile / 2) ^ (column % 8)) * 16;
    selector = lane < 16 ? 0x6420 : 0x7531;
  }
};

__device__ __forceinline__ void load_transposed(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}

__device__ __forceinline__ void store_transposed(const uint32_t (&x)[4], uint32_t at,
                                                 uint32_t selector) {
  const uint32_t other = selector ^ 0x1111;
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(__byte_perm(x[0], x[1], selector)), "r"(__byte_perm(x[0], x[1], other)),
               "r"(__byte_perm(x[2], x[3], selector)), "r"(__byte_perm(x[2], x[3], other))
               : "memory");
}

// `x` is four times 8 keys, two of them this thread's; from the first of these on, `keys` count.
__device__ __forceinline__ void clean(uint32_t (&x)[4], int keys, uint32_t& found) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] &= keys > 8 * i + 1 ? ~0u : keys > 8 * i ? 0xffffu : 0u;
    const uint32_t marks = nan_marks(x[i]) & kMarks;
    found |= marks;
    x[i] &= ~((marks >> 7) * 0xffu);
  }
}

// One warp's share of a tile, with `keys` rows that count. Returns whether NaN was found.
template <class Traits, Care kCare>
__device__ __forceinline__ bool transpose(const unsigned char* raw, unsigned char* v, int keys) {
  const Lane lane;
  constexpr int kSteps = Traits::kBlockKV / 32, kAtOnce = kCare == Care::kClean ? 1 : kSteps;
  uint32_t found = 0;
#pragma unroll 1
  for (unsigned segment = threadIdx.x / kWarp - 1; segment < Traits::kHeadDimV / 16;
       segment += kTransposers) {
    const uint32_t source = (shared_address(raw) + lane.source ^ segment % 8 * 16) +
                            segment / 8 * Traits::kBlockKV * kChunkBytes;
    const uint32_t target = shared_address(v) + lane.target + segment * 16 * kChunkBytes;
#pragma unroll(kSteps / kAtOnce == 1 ? kSteps / kAtOnce : 1)
    for (int step = 0; step < kSteps; step += kAtOnce) {
      uint32_t x[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        load_transposed(x[i], source + (step + i) * 32 * kChunkBytes);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (kCare == Care::kLook) {
#pragma unroll
          for (int word = 0; word < 4; ++word) found |= nan_marks(x[i][word]);
        }
        if (kCare == Care::kClean) {
          clean(x[i], keys - 32 * (step + i) - int(threadIdx.x) % 4 * 2, found);
        }
        store_transposed(x[i], target ^ (step + i) * 32, lane.selector);
      }
    }
  }
  return kCare != Care::kNone && __any_sync(~0u, (found & kMarks) != 0);
}

// The life of a transposing warp: tile after tile, wait until V has landed and a slot is free,
// transpose, hand over. Rows that a query row must not see may hold NaN, and 0 x NaN is NaN: then
// zeros take their place, and the tile of work is marked, so that the query rows which do see them
// get them back at the end.
template <class Traits>
__device__ __forceinline__ void transpose_all(typename Traits::Shared& shared) {
  for (Counter tile;; ++tile.passed) {
    const int from = tile.slot<Traits::kStagesRaw>(), to = tile.slot<Traits::kStages>();
    shared.raw_full[from].wait(tile.parity<Traits::kStagesRaw>());
    const Order& order = shared.orders[from];
    if (order.care == Care::kEnd) return;
    shared.v_empty[to].wait(tile.parity<Traits::kStages>() ^ 1);
    if (order.care == Care::kNone) {
      transpose<Traits, Care::kNone>(shared.raw[from], shared.v[to], order.keys);
    } else if (order.care == Care::kClean ||
               transpose<Traits, Care::kLook>(shared.raw[from], shared.v[to], order.keys)) {
      const bool found =
          transpose<Traits, Care::kClean>(shared.raw[from], shared.v[to], order.keys);
      if (found && threadIdx.x % kWarp == 0) shared.work[order.work].poisoned = 1;
    }
    fence_async_proxy();
    __syncwarp();
    asm volatile("" : "+r"(tile.passed));  // addresses are worked out again, not kept in registers
    if (threadIdx.x % kWarp == 0) {
      shared.v_full[tile.slot<Traits::kStages>()].arrive();
      shared.raw_empty[from].arrive();
    }
  }
}

}  // namespace flash::v3::fp8
