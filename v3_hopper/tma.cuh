// Tensor memory access: descriptors made on the host, tile copies issued by one thread.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "v3_hopper/ptx.cuh"

namespace flash::v3 {

// --- host ---

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                     &found);
    return found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry)
               : nullptr;
  }();
  return encoder;
}

// The driver's own calls need a current context. A thread that has not called the runtime yet has
// none: one of autograd's, for example, when a backward pass is the first that it does.
inline cudaError_t bind_context() {
  thread_local const cudaError_t bound = [] {
    int device = 0;
    const cudaError_t status = cudaGetDevice(&device);
    return status == cudaSuccess ? cudaSetDevice(device) : status;
  }();
  return bound;
}

// What a tensor map needs besides the View: (dim, rows, heads, batch) and the box of one copy.
struct MapShape {
  CUtensorMapDataType type;
  int element_bytes;
  int64_t dim, rows, heads, batch;
  int box_columns, box_rows;
};

// A map of 4 dimensions (dim, row, head, batch) with 128-byte swizzle; out-of-range elements read
// as zero and are not written. cudaErrorInvalidValue: strides or alignment that TMA cannot take.
inline cudaError_t make_map(CUtensorMap& map, const View& view, const MapShape& shape) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  if (const cudaError_t status = bind_context(); status != cudaSuccess) return status;
  const int64_t sizes[4] = {shape.dim, shape.rows, shape.heads, shape.batch};
  const int64_t strides[4] = {1, view.row, view.head, view.batch};
  cuuint64_t size[4], stride_bytes[3];
  // Dimensions of size 1 may come with any stride: give them one that is always legal.
  const int64_t harmless = (shape.dim * shape.element_bytes + 15) / 16 * 16;
  for (int i = 0; i < 4; ++i) {
    size[i] = cuuint64_t(sizes[i] > 0 ? sizes[i] : 1);
    if (i == 0) continue;
    const int64_t bytes = size[i] == 1 ? harmless : strides[i] * shape.element_bytes;
    if (bytes < 0 || bytes % 16 != 0) return cudaErrorInvalidValue;  // 0: broadcast
    stride_bytes[i - 1] = cuuint64_t(bytes);
  }
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0) return cudaErrorInvalidValue;
  const cuuint32_t box[4] = {cuuint32_t(shape.box_columns), cuuint32_t(shape.box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, shape.type, 4, view.data, size, stride_bytes, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class T>
inline constexpr CUtensorMapDataType kMapType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
template <>
inline constexpr CUtensorMapDataType kMapType<fp16> = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
template <>
inline constexpr CUtensorMapDataType kMapType<fp32> = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
template <>
inline constexpr CUtensorMapDataType kMapType<e4m3> = CU_TENSOR_MAP_DATA_TYPE_UINT8;

// --- device ---

// Where a box lies in the tensor.
struct Coordinate {
  int column, row, head, batch;
};

// How long L2 should keep what a copy brings: the encoded policies of createpolicy.fractional.
enum class Keep : uint64_t {
  kNormal = 0x1000000000000000,
  kFirstOut = 0x12F0000000000000,
  kLastOut = 0x14F0000000000000,
};

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies one box into shared memory; its bytes count on `full`. Issued by one thread.
__device__ __forceinline__ void load_box(void* shared, const CUtensorMap& map, Coordinate at,
                                         Barrier& full, Keep keep = Keep::kNormal) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&full.word)), "r"(at.column), "r"(at.row), "r"(at.head),
      "r"(at.batch), "l"(uint64_t(keep))
      : "memory");
}

// Writes one box back; ends with commit_stores and wait_stores*.
__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* shared,
                                          Coordinate at) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(shared_address(shared)), "r"(at.column), "r"(at.row), "r"(at.head), "r"(at.batch)
      : "memory");
}
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// All but kPending groups of stores have read their shared memory: it may be written again.
template <int kPending>
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Adds contiguous fp32 values from shared memory to global memory, in L2.
__device__ __forceinline__ void add_bulk(float* global, const void* shared, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
      "r"(shared_address(shared)), "r"(bytes)
      : "memory");
}

}  // namespace flash::v3
