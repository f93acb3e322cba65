// Which keys a query row may see, and which blocks therefore need no mask, a mask, or no visit.
#pragma once

#include "common/params.h"

namespace flash {

// Keys or query rows [begin, end) of a block loop; empty when end <= begin.
struct Range {
  int begin, end;
  __device__ __forceinline__ bool holds(int i) const { return i >= begin && i < end; }
};

// One sequence of the batch: its lengths, its first rows, and its band of visible keys.
// Row r sees key c when r + first <= c <= r + last and c < seqlen_k.
struct Sequence {
  int seqlen_q, seqlen_k;
  int64_t row_q, row_k;  // first row in the packed tensors; 0 when dense
  int first, last;       // band offsets: alignment and window in one

  template <class Params>
  __device__ __forceinline__ Sequence(const Params& p, int batch) {
    const bool varlen_q = p.cu_seqlens_q != nullptr;
    const bool varlen_k = p.cu_seqlens_k != nullptr;
    row_q = varlen_q ? p.cu_seqlens_q[batch] : 0;
    row_k = varlen_k ? p.cu_seqlens_k[batch] : 0;
    seqlen_q = varlen_q ? p.cu_seqlens_q[batch + 1] - int(row_q) : p.seqlen_q;
    seqlen_k = varlen_k ? p.cu_seqlens_k[batch + 1] - int(row_k) : p.seqlen_k;
    constexpr int kFar = 1 << 29;
    const int shift = p.top_left ? 0 : seqlen_k - seqlen_q;
    first = p.window_left == kUnlimited ? -kFar : max(shift - min(p.window_left, kFar), -kFar);
    last = p.window_right == kUnlimited ? kFar : min(shift + min(p.window_right, kFar), kFar);
  }

  __device__ __forceinline__ bool visible(int row, int key) const {
    return key >= row + first && key <= row + last && key < seqlen_k;
  }

  // Keys that any of the query rows [row, row + rows) sees.
  __device__ __forceinline__ Range keys(int row, int rows) const {
    const int last_row = min(row + rows, seqlen_q) - 1;
    return {max(0, row + first), min(seqlen_k, last_row + last + 1)};
  }

  // Keys that every one of the rows [row, row + rows) sees.
  __device__ __forceinline__ Range common_keys(int row, int rows) const {
    return {max(0, row + rows - 1 + first), max(0, min(seqlen_k, row + last + 1))};
  }

  // Query rows that see any of the keys [key, key + n).
  __device__ __forceinline__ Range rows(int key, int n) const {
    const int last_key = min(key + n, seqlen_k) - 1;
    return {max(0, key - last), min(seqlen_q, last_key - first + 1)};
  }

  // Every one of the rows [row, row + rows) sees every one of the keys [key, key + n).
  __device__ __forceinline__ bool all_visible(int row, int rows, int key, int n) const {
    return key >= row + rows - 1 + first && key + n - 1 <= row + last && key + n <= seqlen_k;
  }
};

}  // namespace flash
