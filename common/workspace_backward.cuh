// The device memory that a backward call borrows.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace flash {

// The only device memory of the backward pass: two statistics per row, and dQ in fp32. Rows are
// padded to whole blocks for each sequence; dQ blocks are stored as accumulator fragments.
template <class Traits>
struct BackwardWorkspace {
  float* lse;    // (heads_q, rows): LSE * log2(e), +inf for rows without a key
  float* delta;  // (heads_q, rows): rowsum(dO * O) - dLSE
  float* dq;     // (heads_q, rows / kBlockQ, kBlockQ * kHeadDim); null: not summed here
  int64_t rows;

  // Is dQ summed in memory? Not if a kernel of its own makes it, in a fixed order.
  static bool adds_dq(const Problem& p) { return !(p.deterministic && Traits::kDqKernel); }

  static int64_t padded_rows(const Problem& p, bool varlen) {
    const int64_t dense = (int64_t(p.seqlen_q) + Traits::kBlockQ - 1) / Traits::kBlockQ * p.batch;
    return (varlen ? p.total_q / Traits::kBlockQ + p.batch : dense) * Traits::kBlockQ;
  }
  static int64_t bytes(int64_t rows, const Problem& p) {
    const int64_t columns = 2 + (adds_dq(p) ? Traits::kHeadDim : 0);
    return rows * p.heads_q * columns * int64_t(sizeof(float));
  }
  explicit BackwardWorkspace(const BackwardParams& p)
      : rows(padded_rows(p, p.cu_seqlens_q != nullptr)) {
    lse = static_cast<float*>(p.workspace);
    delta = lse + rows * p.heads_q;
    dq = adds_dq(p) ? delta + rows * p.heads_q : nullptr;
  }

  // First padded row of a sequence: below every later sequence's, above every earlier one's.
  __device__ __forceinline__ static int64_t first_row(const BackwardParams& p, int batch,
                                                      int64_t row_q) {
    if (p.cu_seqlens_q != nullptr) return (row_q / Traits::kBlockQ + batch) * Traits::kBlockQ;
    return int64_t(batch) * ((p.seqlen_q + Traits::kBlockQ - 1) / Traits::kBlockQ) *
           Traits::kBlockQ;
  }
};

}  // namespace flash
