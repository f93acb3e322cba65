// Where results go: dS to shared memory, dQ sums to L2, dK and dV to their tensors.
#pragma once

#include "common/ptx.cuh"
#include "v3_hopper/schedule_backward.cuh"

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
#pragma unroll
  for (int slab = 0; slab < N / 4; ++slab) {
    const int piece = (slab % 4 * 2 + side) ^ (row % 8);
    stmatrix_x4(rows + slab / 4 * chunk_bytes + row * 128 + piece * 16, r + 4 * slab);
  }
}

// --- dQ ---

// Adds this warpgroup's part of a dQ block in L2; `target` is this thread's place in it.
template <int N>
__device__ __forceinline__ void add_dq(float* target, const float (&dq)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    asm volatile(
        "red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target + i * kWarpgroup),
        "f"(dq[i]), "f"(dq[i + 1]), "f"(dq[i + 2]), "f"(dq[i + 3])
        : "memory");
  }
}

// Deterministic sums: returns when it is this key tile's turn.
__device__ __forceinline__ void await_turn(const int* turn, int mine, int barrier) {
  if (threadIdx.x % kWarpgroup == 0) {
    int now;
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
    } while (now != mine);
  }
  named_sync(barrier, kWarpgroup);
}

// All adds of this warpgroup are done: the next key tile may add.
__device__ __forceinline__ void pass_turn(int* turn, int barrier) {
  __threadfence();
  named_sync(barrier, kWarpgroup);
  if (threadIdx.x % kWarpgroup == 0) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turn) : "memory");
  }
}

// --- 16-bit gradients ---

// Rounds 64 rows of a gradient into a tile in shared memory, from `first_row`.
template <class Element, int kChunks, int kRows, int N>
__device__ __forceinline__ void stage_gradient(Element (&tile)[kChunks][kRows][kChunkColumns],
                                               int first_row, const float (&d)[N], float scale) {
  uint32_t r[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    r[i] = pack<Element>(d[2 * i] * scale, d[2 * i + 1] * scale);
  }
  const int warp = threadIdx.x / 32 % 4;
  store_fragment(shared_address(tile[0][first_row + 16 * warp]), sizeof(tile[0]), r);
}

// Copies 64 staged rows to global memory, 16 bytes per thread and step.
template <class Element, int kChunks, int kRows>
__device__ __forceinline__ void store_gradient(
    const Element (&tile)[kChunks][kRows][kChunkColumns], int first_row, Element* target,
    int64_t stride, int rows, int columns) {
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
