// Host side of the forward pass: tensor maps, a persistent grid, shared memory, one launch.
#pragma once

#include <numeric>

#include "common/backend.h"
#include "common/launch.cuh"
#include "v3_hopper/forward.cuh"
#include "v3_hopper/fp8_forward.cuh"
#include "v3_hopper/launch_backward.cuh"

namespace flash::v3 {

// The constants and the kernel that serve an instance.
template <class Instance, bool kFeatured>
using ForwardTraits =
    std::conditional_t<kDType<typename Instance::Element> == DType::kFloat8E4M3,
                       fp8::Traits<Instance, kFeatured>, Traits<Instance, kFeatured>>;

template <class Traits>
constexpr auto forward_kernel_of() {
  if constexpr (kDType<typename Traits::Element> == DType::kFloat8E4M3) {
    return fp8::forward_kernel<Traits>;
  } else {
    return forward_kernel<Traits>;
  }
}

// Query tiles in all; for packed sequences an upper bound.
template <class Traits>
int64_t count_tiles(const Problem& p) {
  const int64_t dense = int64_t(p.batch) * ceil_div(p.seqlen_q, Traits::kBlockQ);
  const int64_t packed = p.total_q / Traits::kBlockQ + p.batch;
  return p.heads_q * (dense < packed ? dense : packed);
}

// Causal heads whose tiles fill whole pairs of rounds, so that each CTA gets as many long ones as
// short ones.
template <class Traits>
int count_folded(const Problem& p, int group, int tiles_q) {
  const bool causal = p.window_right != kUnlimited && p.window_left == kUnlimited;
  if (!Traits::kFolds || !causal || tiles_q % 2 != 0) return 0;
  const int round = 2 * multiprocessors();
  const int step = round / std::gcd(round, group * tiles_q) * group;
  return p.batch * p.heads_q / step * step;
}

// Full masks: one KV head after the other, so that its K and V are read from L2. Masks that make
// tiles uneven: as many heads folded as fit. Of the others, a quarter as many KV heads as
// multiprocessors side by side, so that four CTAs share each K/V (more where query heads share
// them); where these are not whole rounds of the grid, which alternating directions level out, half
// as many, for fewer seams.
template <class Traits>
ScheduleParams make_schedule(const Problem& p) {
  const int group = p.heads_q / p.heads_kv, tiles_q = ceil_div(p.seqlen_q, Traits::kBlockQ);
  const int sms = multiprocessors(), quarter = sms / 4 * group;
  const int heads = int64_t(quarter) * tiles_q % sms == 0 ? quarter : sms / 2 * group;
  const bool uneven = p.window_right != kUnlimited;
  return {tiles_q, count_folded<Traits>(p, group, tiles_q), uneven && heads > group ? heads : group,
          nullptr};
}

// Rows of a tensor in memory, and how many batches of them.
template <class Element>
MapShape map_shape(int64_t dim, int64_t rows, int64_t heads, int64_t batch, int box_rows) {
  return {kMapType<Element>,
          int(sizeof(Element)),
          dim,
          rows,
          heads,
          batch,
          kChunkBytes / int(sizeof(Element)),
          box_rows};
}

template <class Traits>
cudaError_t make_maps(Arguments& args) {
  const ForwardParams& p = args.p;
  const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = p.cu_seqlens_k != nullptr;
  const int64_t rows_q = packed_q ? p.total_q : p.seqlen_q, batch_q = packed_q ? 1 : p.batch;
  const int64_t rows_k = packed_k ? p.total_k : p.seqlen_k, batch_k = packed_k ? 1 : p.batch;
  auto map = [](auto element, CUtensorMap& to, const View& view, int dim, int64_t rows, int heads,
                int64_t batch, int box_rows) {
    return make_map(to, view, map_shape<decltype(element)>(dim, rows, heads, batch, box_rows));
  };
  constexpr typename Traits::Element in = {};
  constexpr typename Traits::Output out = {};
  cudaError_t status_k, status_v;
  if constexpr (Traits::kKeysContiguous) {
    status_k = fp8::make_map_k<Traits>(args.k, p);
    status_v = fp8::make_map_v<Traits>(args.v, p);
  } else {
    status_k = map(in, args.k, p.k, p.head_dim, rows_k, p.heads_kv, batch_k, Traits::kBlockKV);
    status_v = map(in, args.v, p.v, p.head_dim_v, rows_k, p.heads_kv, batch_k, Traits::kBlockKV);
  }
  const cudaError_t results[] = {
      status_k, status_v, map(in, args.q, p.q, p.head_dim, rows_q, p.heads_q, batch_q, kGroupRows),
      map(out, args.o, p.o, p.head_dim_v, rows_q, p.heads_q, batch_q, kGroupRows)};
  for (const cudaError_t result : results) {
    if (result != cudaSuccess) return result;
  }
  return cudaSuccess;
}

inline bool is_uneven(const Problem& p) { return p.total_q != int64_t(p.batch) * p.seqlen_q; }

// Tiles of sequences of different lengths are claimed one by one, from a counter in the workspace.
template <class Traits>
bool claims_tiles(const Problem& p) {
  return kDType<typename Traits::Element> != DType::kFloat8E4M3 && is_uneven(p);
}

template <class Traits>
cudaError_t launch_traits(const ForwardParams& p) {
  Arguments args = {};
  args.p = p;
  args.schedule = make_schedule<Traits>(p);
  if (p.cu_seqlens_q != nullptr && p.workspace != nullptr && claims_tiles<Traits>(p)) {
    args.schedule.claimed = static_cast<int*>(p.workspace);
    const cudaError_t cleared = cudaMemsetAsync(p.workspace, 0, sizeof(int), p.stream);
    if (cleared != cudaSuccess) return cleared;
  }
  const cudaError_t status = make_maps<Traits>(args);
  if (status != cudaSuccess) return status;
  const int64_t tiles = count_tiles<Traits>(p);
  if (tiles > (1 << 30)) return cudaErrorInvalidValue;  // tiles are counted in 32 bits
  for (const Descale& d : {p.q_descale, p.k_descale, p.v_descale}) {
    if (d.rows != 0 && d.rows != fp8::kScaleRows) return cudaErrorInvalidValue;
  }
  const int sms = multiprocessors();
  const dim3 grid(tiles < sms ? int(tiles) : sms);
  return launch(forward_kernel_of<Traits>(), grid, Traits::kThreads,
                int(sizeof(typename Traits::Shared)), p.stream, args);
}

// Long tiles serve dense tensors only: packed ones keep the bits of a loop over their sequences.
template <class Instance>
constexpr bool kHasLongTiles = kDType<typename Instance::Element> != DType::kFloat8E4M3 &&
                               kHasLong<Instance::kHeadDim, Instance::kHeadDimV>;
inline bool is_long(const Problem& p) {
  const bool full = p.window_left == kUnlimited && p.window_right == kUnlimited;
  return p.seqlen_q >= (full ? kLongRowsFull : kLongRows) &&
         p.total_q * p.heads_q >= kLongRowsOfAllHeads && !is_uneven(p);
}

template <class Instance>
cudaError_t launch_forward(const ForwardParams& p) {
  if (count_tiles<ForwardTraits<Instance, false>>(p) == 0) return cudaSuccess;
  const bool featured = p.softcap > 0.0f || !(p.scale > 0.0f);
  if constexpr (kDType<typename Instance::Element> == DType::kFloat8E4M3) {
    if (fp8::has_contiguous_keys(p)) {
      return featured ? launch_traits<fp8::Traits<Instance, true, true>>(p)
                      : launch_traits<fp8::Traits<Instance, false, true>>(p);
    }
  }
  if (featured) return launch_traits<ForwardTraits<Instance, true>>(p);
  if constexpr (kHasLongTiles<Instance>) {
    if (is_long(p)) return launch_traits<Traits<Instance, false, true>>(p);
  }
  return launch_traits<ForwardTraits<Instance, false>>(p);
}

template <class Traits>
Plan plan_traits(const Problem& p) {
  const int64_t tiles = count_tiles<Traits>(p);
  const int sms = multiprocessors();
  return {Traits::kBlockQ,
          Traits::kBlockKV,
          Traits::kStages,
          Traits::kThreads,
          tiles < sms ? tiles : sms,
          int(sizeof(typename Traits::Shared)),
          claims_tiles<Traits>(p) ? int64_t(sizeof(int)) : 0};
}

template <class Instance>
Plan plan_forward(const Problem& p) {
  if constexpr (kHasLongTiles<Instance>) {
    if (is_long(p)) return plan_traits<Traits<Instance, false, true>>(p);
  }
  return plan_traits<ForwardTraits<Instance, false>>(p);
}

template <class Instance>
cudaError_t probe_forward() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, forward_kernel_of<ForwardTraits<Instance, false>>());
}

}  // namespace flash::v3
