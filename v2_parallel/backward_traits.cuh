// Every compile-time constant of the backward pass: tiles, warps, shared memory, workspace.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/params.h"
#include "common/swizzle.cuh"

namespace flash::v2 {

// kFeatured serves softcap and rows that are not 16-byte aligned.
template <class Instance, bool kIsFeatured = false>
struct BackwardTraits {
  using Element = typename Instance::Element;
  static constexpr bool kFeatured = kIsFeatured;
  static constexpr int kHeadDim = Instance::kHeadDim;
  static constexpr int kBlockQ = 64;
  static constexpr int kBlockKV = kHeadDim <= 128 ? 128 : 64;
  static constexpr int kStages = 2;  // of Q and dO

  // A warp owns 32 keys. kSplit warps share them: each takes a slice of the query rows in S and
  // dP, and a slice of the channels in dK and dV, so that the accumulators fit in registers.
  static constexpr int kWarpKeys = 32;
  static constexpr int kKeyWarps = kBlockKV / kWarpKeys;
  static constexpr int kSplit = kHeadDim <= 64 ? 1 : kHeadDim <= 128 ? 2 : 4;
  static constexpr int kWarps = kKeyWarps * kSplit;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kCtasPerSm = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kStepQ = kSplit == 1 ? 32 : kBlockQ;  // rows between two updates of dK, dV
  static constexpr int kWarpQ = kStepQ / kSplit;
  static constexpr int kWarpDim = kHeadDim / kSplit;

  // dQ is split over the warps as rows times channels.
  static constexpr int kDqWarpsQ = kHeadDim == 96 ? 4 : 2;
  static constexpr int kDqRows = kBlockQ / kDqWarpsQ;
  static constexpr int kDqDim = kHeadDim / (kWarps / kDqWarpsQ);
  static_assert(kStages * kBlockQ >= kBlockKV, "dQ's kernel keeps the statistics of kBlockKV rows");
  static_assert(kWarpQ % 16 == 0 && kWarpDim % 16 == 0 && kDqRows % 16 == 0 && kDqDim % 16 == 0);

  using Rows = SwizzledRows<kHeadDim>;   // Q, dO, K, V
  using Scores = SwizzledRows<kBlockQ>;  // P and dS, transposed: (kBlockKV, kBlockQ)

  struct Shared {
    Element k[kBlockKV * kHeadDim];
    Element v[kBlockKV * kHeadDim];
    Element q[kStages][kBlockQ * kHeadDim];
    Element dout[kStages][kBlockQ * kHeadDim];
    Element ds[2][kBlockKV * kBlockQ];
    Element p[kSplit == 1 ? 8 : kBlockKV * kBlockQ];
    float lse[kStages][kBlockQ];  // at least kBlockKV in all
    float delta[kStages][kBlockQ];
    float poison[kBlockKV];  // NaN for a key that was not finite, else 0
  };
};

// The only device memory of the backward pass: two statistics per row, and dQ in fp32. Rows are
// padded to whole blocks for each sequence; dQ blocks are stored as accumulator fragments.
template <class Traits>
struct BackwardWorkspace {
  float* lse;    // (heads_q, rows): LSE * log2(e), +inf for rows without a key
  float* delta;  // (heads_q, rows): rowsum(dO * O) - dLSE
  float* dq;     // (heads_q, rows / kBlockQ, kBlockQ * kHeadDim); null when deterministic
  int64_t rows;

  static int64_t padded_rows(const Problem& p, bool varlen) {
    const int64_t dense = (int64_t(p.seqlen_q) + Traits::kBlockQ - 1) / Traits::kBlockQ * p.batch;
    return (varlen ? p.total_q / Traits::kBlockQ + p.batch : dense) * Traits::kBlockQ;
  }
  static int64_t bytes(int64_t rows, const Problem& p) {
    const int64_t columns = 2 + (p.deterministic ? 0 : Traits::kHeadDim);
    return rows * p.heads_q * columns * int64_t(sizeof(float));
  }
  BackwardWorkspace(const BackwardParams& p) : rows(padded_rows(p, p.cu_seqlens_q != nullptr)) {
    lse = static_cast<float*>(p.workspace);
    delta = lse + rows * p.heads_q;
    dq = p.deterministic ? nullptr : delta + rows * p.heads_q;
  }

  // First padded row of a sequence: below every later sequence's, above every earlier one's.
  __device__ __forceinline__ static int64_t first_row(const BackwardParams& p, int batch,
                                                      int64_t row_q) {
    if (p.cu_seqlens_q != nullptr) return (row_q / Traits::kBlockQ + batch) * Traits::kBlockQ;
    return int64_t(batch) * ((p.seqlen_q + Traits::kBlockQ - 1) / Traits::kBlockQ) *
           Traits::kBlockQ;
  }
};

}  // namespace flash::v2
