// Where V comes with its keys contiguous, as the product wants it, P has them in their order only
// if the columns of S are not: K's rows are brought in the order in which accumulators hold them.
#pragma once

#include "v3_hopper/fp8_traits.cuh"

namespace flash::v3::fp8 {

// Of 16 keys 4 c + 2 h + e (c < 4; h, e < 2) a thread c of a quad holds, for P, the four of its c.
// Rows h = 0 of a block of K come first, then rows h = 1: a thread then has e = 0, 1 of each.
inline constexpr int kKeyGroup = 4, kKeyPair = 2;
// Keys, and bytes between columns of V, come in multiples of this.
inline constexpr int kKeyAlignment = 16;

// --- host ---

// V (batch, keys, heads, dv), keys contiguous: View::row is 1, and a head's columns lie one behind
// the other, so that the distance between heads tells that between columns.
inline bool has_contiguous_keys(const ForwardParams& p) {
  return p.cu_seqlens_k == nullptr && p.seqlen_k > 1 && p.v.row == 1;
}

// K as (dim, key % 4, key / 4, head, batch); a box has 64 keys of one half.
template <class Traits>
cudaError_t make_map_k(CUtensorMap& map, const ForwardParams& p) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  if (const cudaError_t status = bind_context(); status != cudaSuccess) return status;
  const View& k = p.k;
  if (p.seqlen_k % kKeyAlignment != 0 || reinterpret_cast<uintptr_t>(k.data) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  const cuuint64_t size[5] = {cuuint64_t(p.head_dim), kKeyGroup, cuuint64_t(p.seqlen_k / kKeyGroup),
                              cuuint64_t(p.heads_kv), cuuint64_t(p.batch)};
  const int64_t strides[4] = {k.row, kKeyGroup * k.row, k.head, k.batch};
  cuuint64_t stride_bytes[4];
  for (int i = 0; i < 4; ++i) {
    const int64_t bytes = size[i + 1] == 1 ? p.head_dim : strides[i];  // of a size 1: any stride
    if (bytes < 0 || bytes % 16 != 0) return cudaErrorInvalidValue;
    stride_bytes[i] = cuuint64_t(bytes);
  }
  const cuuint32_t box[5] = {kChunkBytes, kKeyPair, Traits::kBlockKV / kKeyGroup, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(&map, kMapType<e4m3>, 5, k.data, size, stride_bytes, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// V as (key, column, head, batch); a box is a whole block. Keys behind the last one are zeros.
template <class Traits>
cudaError_t make_map_v(CUtensorMap& map, const ForwardParams& p) {
  constexpr int kColumns = Traits::kHeadDimV;
  if (p.head_dim_v != kColumns || p.v.head % kColumns != 0) return cudaErrorInvalidValue;
  const View columns = {p.v.data, p.v.batch, p.v.head / kColumns, p.v.head};
  return make_map(
      map, columns,
      {kMapType<e4m3>, 1, p.seqlen_k, kColumns, p.heads_kv, p.batch, Traits::kBlockKV, kColumns});
}

// --- device ---

// Keys `half` of every group of four, from the group on.
__device__ __forceinline__ void load_keys(void* shared, const CUtensorMap& map, int column,
                                          int half, int group, int head, int batch, Barrier& full) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&full.word)), "r"(column), "r"(half * kKeyPair), "r"(group),
      "r"(head), "r"(batch)
      : "memory");
}

}  // namespace flash::v3::fp8
