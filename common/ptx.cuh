// One function per machine instruction that the kernels of more than one version use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flash {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same value, of which the compiler knows nothing: what follows from it is computed here and
// now, not before a loop, where the results would only occupy registers.
template <class T>
__device__ __forceinline__ T opaque(T x) {
  asm volatile("" : "+r"(x));
  return x;
}
// --- shared memory, plainly

__device__ __forceinline__ void load_shared_16(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
  uint32_t r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(address) : "memory");
  return r;
}

__device__ __forceinline__ void store_shared_16(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ __forceinline__ void store_shared_4(uint32_t address, uint32_t r) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(r) : "memory");
}

// --- copies, global to shared

// 16 bytes past the L1 cache; zeros when the source is out of range (and is then not read).
__device__ __forceinline__ void cp_async_16(uint32_t target, const void* source, bool in_range) {
#if __CUDA_ARCH__ < 800  // no asynchronous copies: through registers
  const uint4 x = in_range ? *static_cast<const uint4*>(source) : uint4{};
  store_shared_16(target, {x.x, x.y, x.z, x.w});
#else
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(in_range ? 16 : 0)
               : "memory");
#endif
}

// The same for a source in range, or nothing at all.
__device__ __forceinline__ void cp_async_16_if(bool condition, uint32_t target,
                                               const void* source) {
#if __CUDA_ARCH__ < 800
  if (condition) cp_async_16(target, source, true);
#else
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %2, 0; "
      "@p cp.async.cg.shared.global.L2::128B [%0], [%1], 16; }" ::"r"(target),
      "l"(source), "r"(uint32_t(condition))
      : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// All but the newest kPending groups of this thread have arrived.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// --- barriers in shared memory (8 bytes): a phase ends when `count` arrivals have come. Before
// sm_80 a word counts all arrivals ever made, and the other holds `count`.

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
#if __CUDA_ARCH__ < 800
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(barrier), "r"(0), "r"(count) : "memory");
#else
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
#if __CUDA_ARCH__ < 800
  __threadfence_block();
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(barrier) : "memory");
#else
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier)
               : "memory");
#endif
}

// Arrives once the copies that this thread has issued so far are in shared memory.
__device__ __forceinline__ void barrier_arrive_copies(uint32_t barrier) {
#if __CUDA_ARCH__ < 800
  barrier_arrive(barrier);
#else
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

// Returns when phase number `phase` (0, 1, ...) has ended; at most one later phase may end
// meanwhile.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
#if __CUDA_ARCH__ < 800
  uint32_t arrived, count;
  do {
    asm volatile("ld.volatile.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(arrived), "=r"(count)
                 : "r"(barrier)
                 : "memory");
  } while (arrived < (phase + 1) * count);
  __threadfence_block();
#else
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(phase & 1)
        : "memory");
  } while (!done);
#endif
}

// Waits for `threads` threads at hardware barrier `id` (1 to 15), which whole warps share.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// True for all threads when `condition` is true for one.
__device__ __forceinline__ bool named_barrier_or(int barrier, int threads, bool condition) {
  uint32_t any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %3, 0; bar.red.or.pred q, %1, %2, p; "
      "selp.u32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"(barrier), "r"(threads), "r"(uint32_t(condition))
      : "memory");
  return any != 0;
}

// --- shared to registers, as fragments of matrix instructions

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// And back, from the fragments of an accumulator; sm_90.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// --- matrix products: D (16, 8) += A (16, 16) B (16, 8), fp32 accumulators; tf32: A (16, 8) B (8,
// 8)

template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ < 800  // half the depth at a time
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(k == 0 ? b0 : b1));
  }
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- arithmetic

// x *= y, here and now. Left to itself, the compiler moves such products of whole accumulators into
// the branches that follow, keeps both old and new, and spills.
__device__ __forceinline__ void multiply_here(float& x, float y) {
  asm volatile("mul.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
}

// 2^x; denormal results are 0, exp2(-inf) is 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Absolute error below 4e-7; tanh.approx is off by up to 5e-4, too much for a score.
__device__ __forceinline__ float fast_tanh(float x) {
  return 1.0f - __fdividef(2.0f, fast_exp2(x * 2.885390081777927f) + 1.0f);
}

// Two floats rounded to one register of 16-bit elements; `low` has the lower address.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

// x * y + z on pairs of 16-bit elements.
template <class Element>
__device__ __forceinline__ uint32_t multiply_add(uint32_t x, uint32_t y, uint32_t z);

template <>
__device__ __forceinline__ uint32_t multiply_add<__half>(uint32_t x, uint32_t y, uint32_t z) {
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(z) : "r"(x), "r"(y));
  return z;
}

template <>
__device__ __forceinline__ uint32_t multiply_add<__nv_bfloat16>(uint32_t x, uint32_t y,
                                                                uint32_t z) {
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(z) : "r"(x), "r"(y));
  return z;
}

// Elements with all of these bits set are NaN or infinite.
template <class Element>
inline constexpr uint32_t kExponentBits = 0x7c00;
template <>
inline constexpr uint32_t kExponentBits<__nv_bfloat16> = 0x7f80;
template <>
inline constexpr uint32_t kExponentBits<float> = 0x7f800000;

// True when either of the two 16-bit elements is NaN or infinite.
template <class Element>
__device__ __forceinline__ bool any_non_finite(uint32_t pair) {
  constexpr uint32_t kLow = kExponentBits<Element>;
  constexpr uint32_t kHigh = kLow << 16;
  return (pair & kLow) == kLow || (pair & kHigh) == kHigh;
}

}  // namespace flash
