// Where results go: dS to shared memory, dQ sums to L2, dK and dV to their tensors.
#pragma once

#include "common/ptx.cuh"
#include "v3_hopper/schedule_backward.cuh"
#include "v3_hopper/tma.cuh"

namespace flash::v3 {

__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t* r) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Writes a warp's 16 rows of 64 columns per chunk into swizzled chunks of `chunk_bytes`.
// `rows` is the shared address of the warp's first row in the first chunk.
template <int N>
__device__ __forceinline__ void store_fragment(uint32_t rows, int chunk_bytes,
                                               const uint32_t (&r)[N]) {
  const int lane = threadIdx.x % 32;
  const int row = lane % 16;
  const int side = lane / 16;
  const uint32_t first = rows + row * 128 + (side ^ row % 8) * 16;
#pragma unroll
  for (int slab = 0; slab < N / 4; ++slab) {
    // Rows begin at multiples of 128 bytes: the piece 2 * slab + side, swizzled.
    stmatrix_x4((first ^ slab % 4 * 32) + slab / 4 * chunk_bytes, r + 4 * slab);
  }
}

// --- dQ ---

// Writes contiguous bytes from shared to global memory.
__device__ __forceinline__ void store_bulk(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

// Puts a warpgroup's part of a dQ block where the copy engine can add it from.
template <int N>
__device__ __forceinline__ void stage_dq(float* staged, const float (&dq)[N]) {
  float* mine = staged + threadIdx.x % kWarpgroup * 4;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    *reinterpret_cast<float4*>(mine + i * kWarpgroup) =
        float4{dq[i], dq[i + 1], dq[i + 2], dq[i + 3]};
  }
}

// Returns when at least this many key tiles have passed their turn.
__device__ __forceinline__ void await_turn(const int* turn, int passed) {
  int now;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
  } while (now < passed);
  asm volatile("fence.proxy.async;" ::: "memory");
}

// This thread's adds are done, in memory: the next key tile may add.
__device__ __forceinline__ void pass_turn(int* turn) {
  asm volatile("cp.async.bulk.wait_group 0;\nfence.proxy.async;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turn) : "memory");
}

// One thread adds what is staged in a buffer, a whole block of dQ or one of its parts, to the sums
// in L2, and gives the buffer back. The first of a block's key tiles stores, so sums need no zeros
// beforehand, unless they have them; deterministic sums keep the order of all.
template <int kParts, class Shared>
__device__ __forceinline__ void add_staged_dq(Shared& shared, const BackwardParams& p,
                                              const Scratch& scratch, int buffer, uint32_t parity,
                                              int64_t block, int tiles_before) {
  constexpr int kBytes = sizeof(shared.dq[0]);
  const int part = kParts > 1 ? buffer : 0;
  int* turn = scratch.turn + 2 * block + part;
  float* target = scratch.dq + (kParts * block + part) * (kBytes / 4);
  const bool first = tiles_before == 0 && !scratch.zeroed;
  if (tiles_before > 0 && !scratch.zeroed) await_turn(turn, p.deterministic ? tiles_before : 1);
  shared.dq_full[buffer].wait(parity);
  if (first) {
    store_bulk(target, shared.dq[buffer], kBytes);
  } else {
    add_bulk(target, shared.dq[buffer], kBytes);
  }
  commit_stores();
  wait_stores_read<0>();
  shared.dq_free[buffer].arrive();
  if (first || p.deterministic) pass_turn(turn);
}

// One thread per consumer warpgroup adds the columns of dQ which that warpgroup stages.
template <class Traits>
__device__ __forceinline__ void add_dq(typename Traits::Shared& shared, const BackwardParams& p,
                                       const Scratch& scratch, const KeyTile& tile,
                                       const Sequence& sequence, RowSteps step, int warpgroup) {
  const int64_t block0 = first_block(p, sequence, tile.batch);
  for (uint32_t parity = 0; step.valid(); step.advance(), parity ^= 1) {
    const int64_t block = step.head * scratch.blocks + block0 + step.block;
    const int tiles_before = tile.template turn<Traits::kBlockKV>(p, sequence, step.row());
    add_staged_dq<Traits::kConsumers>(shared, p, scratch, warpgroup, parity, block, tiles_before);
  }
  if (scratch.shares > 0) pass_turn(scratch.done + tile.batch * p.heads_kv + tile.head_kv);
}

// --- 16-bit gradients ---

// Rounds 64 rows of a gradient into a tile in shared memory, from `first_row`.
template <class Element, int kChunks, int kRows, int N>
__device__ __forceinline__ void stage_gradient(Element (&tile)[kChunks][kRows][kChunkColumns],
                                               int first_row, const float (&d)[N], float scale) {
  uint32_t r[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    r[i] = flash::pack<Element>(d[2 * i] * scale, d[2 * i + 1] * scale);
  }
  const int warp = threadIdx.x / 32 % 4;
  store_fragment(shared_address(tile[0][first_row + 16 * warp]), sizeof(tile[0]), r);
}

// Copies 64 staged rows to global memory, 16 bytes per thread and step.
template <class Element, int kChunks, int kRows>
__device__ __forceinline__ void store_gradient(const Element (&tile)[kChunks][kRows][kChunkColumns],
                                               int first_row, Element* target, int64_t stride,
                                               int rows, int columns) {
  constexpr int kPieces = kChunks * 8;  // of 16 bytes, per row
  const int thread = threadIdx.x % kWarpgroup;
#pragma unroll 4
  for (int i = thread; i < 64 * kPieces; i += kWarpgroup) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    if (row >= rows || piece * 8 >= columns) continue;
    const auto* line = reinterpret_cast<const uint4*>(tile[piece / 8][first_row + row]);
    *reinterpret_cast<uint4*>(target + row * stride + piece * 8) = line[piece % 8 ^ row % 8];
  }
}

}  // namespace flash::v3
