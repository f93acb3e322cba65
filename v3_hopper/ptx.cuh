// Hopper's instructions as small functions: barriers, register reallocation, fences, descriptors.
#pragma once

#include <cstdint>

#include "v3_hopper/wgmma.cuh"

namespace flash::v3 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier in shared memory that counts arrivals and bytes; it completes phase after phase.
struct Barrier {
  uint64_t word;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word)),
                 "r"(arrivals));
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&word))
                 : "memory");
  }
  __device__ __forceinline__ void arrive(int count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word)),
                 "r"(count)
                 : "memory");
  }
  // The phase also waits for this many bytes from TMA,
  __device__ __forceinline__ void expect(int bytes) {
    asm volatile("mbarrier.expect_tx.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word)),
                 "r"(bytes)
                 : "memory");
  }
  // and has one arrival more.
  __device__ __forceinline__ void arrive_expect(int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word)),
        "r"(bytes)
        : "memory");
  }
  // Returns once the phase of this parity is complete: what its arrivers wrote is then visible.
  __device__ __forceinline__ void wait(uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n}\n" ::"r"(shared_address(&word)),
        "r"(parity)
        : "memory");
  }
  // Whether it is complete.
  __device__ __forceinline__ bool test(uint32_t parity) const {
    int done;
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.b32 %0, 1, 0, done;\n}\n"
        : "=r"(done)
        : "r"(shared_address(&word)), "r"(parity)
        : "memory");
    return done;
  }
};

// A position in a ring of kStages slots; the parity flips on every lap.
template <int kStages>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;  // of the fill that a consumer waits for; a producer waits for parity ^ 1

  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Makes barrier initialization visible to the async proxy (TMA).
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's writes to shared memory before later reads by TMA and wgmma.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Named barriers: `threads` counts those that wait and those that only arrive.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Do one producer and some consumer warpgroups get along with what the CTA was launched with: an
// even share of 65536 registers in steps of 8? A warpgroup that asks for more waits forever.
constexpr bool registers_fit(int consumers, int producer_registers, int consumer_registers) {
  const int warpgroups = consumers + 1;
  const int at_launch = 65536 / (warpgroups * 128) / 8 * 8;
  return producer_registers + consumers * consumer_registers <= warpgroups * at_launch;
}

// Every warp of a warpgroup gives registers back, or waits until it has that many.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A word with that many ones; none below 0, all above 32.
__device__ __forceinline__ uint32_t lowest_bits(int count) {
  uint32_t bits;
  asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(bits) : "r"(max(count, 0)));
  return bits;
}

__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(elected));
  return elected != 0;
}

// Tells the compiler that a value is the same in all lanes, so that it may live in a uniform
// register.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// 2^x with denormals flushed: one MUFU instruction.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to 16 bits, the first one in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t pair;
  if constexpr (kDType<T> == DType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// Four 8x8 tiles of 16-bit elements from registers to shared memory: lane l gives the address of
// row l % 8 of tile l / 8, and holds columns 2 (l % 4) and the next of row l / 4 of each tile.
__device__ __forceinline__ void store_tiles(void* row, const uint32_t (&tile)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(tile[0]), "r"(tile[1]), "r"(tile[2]), "r"(tile[3])
      : "memory");
}

// --- wgmma: ordering ---

// Registers and shared memory that this warpgroup wrote are ready for the wgmmas that follow.
__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// The wgmmas issued since the last commit become one group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of the registers across this point.
template <int N>
__device__ __forceinline__ void pin(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(uint32_t (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

// --- wgmma: operands in shared memory, 128-byte swizzle ---
// A tile is a row of chunks; a chunk is what one TMA box of 128-byte rows writes: `rows` rows of
// 128 bytes (64 elements of 16 bits), base 1024-byte aligned.

inline constexpr int kChunkBytes = 128;

// Descriptor of an operand whose reduced dimension is contiguous (rows = its own dimension).
// Step along the reduced dimension: +32 bytes per instruction inside a chunk, then the next chunk.
__device__ __forceinline__ uint64_t descriptor_k(const void* tile) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  constexpr uint64_t kRowGroup = uint64_t(1024 >> 4) << 32;  // 8 rows of 128 bytes
  return kSwizzle128 | kRowGroup | (uint64_t(1) << 16) | ((shared_address(tile) & 0x3ffff) >> 4);
}

// Descriptor of an operand whose own dimension is contiguous (rows = the reduced dimension):
// chunk_stride bytes lead to the next 64 columns. Step: 16 rows = 2048 bytes per instruction.
__device__ __forceinline__ uint64_t descriptor_mn(const void* tile, int chunk_stride) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  constexpr uint64_t kRowGroup = uint64_t(1024 >> 4) << 32;
  return kSwizzle128 | kRowGroup | (uint64_t(chunk_stride >> 4) << 16) |
         ((shared_address(tile) & 0x3ffff) >> 4);
}

__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + uint64_t(bytes >> 4);
}

}  // namespace flash::v3
