// The backward call of this version, from parameters to grids.
#pragma once

#include <algorithm>

#include "common/backend.h"
#include "common/launch.cuh"
#include "common/passes_backward.cuh"
#include "v1_tiling/backward.cuh"
#include "v1_tiling/fp32_backward.cuh"

namespace flash::v1 {

inline int64_t blocks_of(int64_t n, int block) { return (n + block - 1) / block; }

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

template <class Instance>
inline constexpr bool kIsFp32 = std::is_same_v<typename Instance::Element, fp32>;

// Do the larger tiles fit? They do not on Turing.
template <class Instance>
bool large_backward() {
  return int(sizeof(typename BackwardTraits<Instance>::Shared)) <=
         device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// CTAs for each head. A CTA walks every slices-th key block; one walks them all when the order of
// the sums in dQ must be fixed.
template <class Traits>
int64_t backward_slices(const Problem& p) {
  const int64_t heads = int64_t(p.batch) * p.heads_kv;
  const int64_t blocks = blocks_of(p.seqlen_k, Traits::kBlockKV);
  if (p.deterministic || heads == 0) return std::min<int64_t>(blocks, 1);
  const int64_t ctas = int64_t(8) * device_attribute(cudaDevAttrMultiProcessorCount);
  return std::min(blocks, (ctas + heads - 1) / heads);
}

template <class Traits>
Plan plan_backward_as(const Problem& p) {
  Plan plan;
  plan.block_q = Traits::kBlockQ, plan.block_kv = Traits::kBlockKV;
  plan.stages = Traits::kStages, plan.threads = Traits::kThreads;
  plan.grid = backward_slices<Traits>(p) * p.heads_kv * p.batch;
  plan.shared_bytes = int(sizeof(typename Traits::Shared));
  // The larger of the dense and the packed layout: the problem does not say which it is.
  const int64_t rows = std::max(BackwardWorkspace<Traits>::padded_rows(p, false),
                                BackwardWorkspace<Traits>::padded_rows(p, true));
  plan.workspace_bytes = BackwardWorkspace<Traits>::bytes(rows, p);
  return plan;
}

template <class Instance>
Plan plan_backward(const Problem& p) {
  if constexpr (kIsFp32<Instance>) {
    return plan_backward_as<Fp32BackwardTraits<Instance>>(p);
  } else if constexpr (std::is_same_v<typename Instance::Element, fp16>) {
    using Small = BackwardTraits<Instance, false, true>;
    if (!large_backward<Instance>()) return plan_backward_as<Small>(p);
    return plan_backward_as<BackwardTraits<Instance>>(p);
  } else {
    return plan_backward_as<BackwardTraits<Instance>>(p);
  }
}

template <class Traits>
cudaError_t launch_backward_as(const BackwardParams& p) {
  const Plan plan = plan_backward_as<Traits>(p);
  const BackwardWorkspace<Traits> workspace(p);
  const int row_blocks = int(blocks_of(p.seqlen_q, Traits::kBlockQ));
  const int64_t row_grid = int64_t(row_blocks) * p.heads_q * p.batch;
  cudaError_t status = cudaSuccess;
  if (row_grid > 0) {
    status = launch(prepare_kernel<Traits>, dim3(unsigned(row_grid)), kPassThreads, 0, p.stream, p,
                    workspace, row_blocks);
  }
  if (status == cudaSuccess && plan.grid > 0) {
    void (*kernel)(BackwardParams, BackwardWorkspace<Traits>, int) = nullptr;
    if constexpr (std::is_same_v<typename Traits::Element, fp32>) {
      kernel = fp32_backward_kernel<Traits>;
    } else {
      kernel = backward_kernel<Traits>;
    }
    status = launch(kernel, dim3(unsigned(plan.grid)), Traits::kThreads, plan.shared_bytes,
                    p.stream, p, workspace, int(backward_slices<Traits>(p)));
  }
  if (status == cudaSuccess && row_grid > 0) {
    status = launch(finish_kernel<Traits>, dim3(unsigned(row_grid)), kPassThreads, 0, p.stream, p,
                    workspace, row_blocks);
  }
  return status;
}

template <class Instance, bool kFeatured>
cudaError_t launch_backward_fitting(const BackwardParams& p) {
  if constexpr (kIsFp32<Instance>) {
    return launch_backward_as<Fp32BackwardTraits<Instance, kFeatured>>(p);
  } else if constexpr (std::is_same_v<typename Instance::Element, fp16>) {
    using Small = BackwardTraits<Instance, kFeatured, true>;
    if (!large_backward<Instance>()) return launch_backward_as<Small>(p);
    return launch_backward_as<BackwardTraits<Instance, kFeatured>>(p);
  } else {
    return launch_backward_as<BackwardTraits<Instance, kFeatured>>(p);
  }
}

inline bool rows_aligned(const View& v, const Problem& p) {
  const int64_t strides = v.row | v.head | (p.batch > 1 ? v.batch : 0);
  return reinterpret_cast<uint64_t>(v.data) % 16 == 0 &&
         strides % (p.dtype == DType::kFloat32 ? 4 : 8) == 0;
}

template <class Instance>
cudaError_t launch_backward(const BackwardParams& p) {
  bool plain = p.softcap == 0.0f;
  for (const View* v : {&p.q, &p.k, &p.v, &p.o, &p.dout, &p.dq, &p.dk, &p.dv}) {
    plain = plain && rows_aligned(*v, p);
  }
  return plain ? launch_backward_fitting<Instance, false>(p)
               : launch_backward_fitting<Instance, true>(p);
}

}  // namespace flash::v1
