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
  plan.workspace_bytes = (BackwardWorkspace<Traits>::bytes(rows, p) + 255) / 256 * 256;
  return plan;
}

template <class Instance>
Plan plan_backward(const Problem& p) {
  if constexpr (kIsFp32<Instance>) {
    using Pass = SplitPass<Instance::kHeadDim>;
    Plan plan = plan_backward_as<Fp32BackwardTraits<Instance>>(p);
    plan.workspace_bytes +=
        2 * (Pass::bytes(p.total_q * p.heads_q) + Pass::bytes(p.total_k * p.heads_kv));
    return plan;
  } else if constexpr (std::is_same_v<typename Instance::Element, fp16>) {
    using Small = BackwardTraits<Instance, false, true>;
    if (!large_backward<Instance>()) return plan_backward_as<Small>(p);
    return plan_backward_as<BackwardTraits<Instance>>(p);
  } else {
    return plan_backward_as<BackwardTraits<Instance>>(p);
  }
}

// The main kernel of fp32: of rows that are split first, behind the rest of the workspace.
template <class Traits>
cudaError_t launch_fp32_backward(BackwardParams p, const Plan& plan,
                                 const BackwardWorkspace<Traits>& workspace) {
  SplitPass<Traits::kHeadDim> pass(static_cast<char*>(p.workspace) + plan.workspace_bytes);
  Fp32Gradients gradients = {{}, {}, {}, {}, p.head_dim, p.head_dim_v};
  const int64_t rows_q = p.cu_seqlens_q == nullptr ? p.seqlen_q : p.total_q;
  const int64_t rows_k = p.cu_seqlens_k == nullptr ? p.seqlen_k : p.total_k;
  pass.add(p.q, gradients.q, p.heads_q, p.head_dim, p.total_q, rows_q);
  pass.add(p.dout, gradients.dout, p.heads_q, p.head_dim_v, p.total_q, rows_q);
  pass.add(p.k, gradients.k, p.heads_kv, p.head_dim, p.total_k, rows_k);
  pass.add(p.v, gradients.v, p.heads_kv, p.head_dim_v, p.total_k, rows_k);
  p.head_dim = p.head_dim_v = Traits::kHeadDim;
  const cudaError_t status = pass.run(p.stream);
  if (status != cudaSuccess) return status;
  return launch(fp32_backward_kernel<Traits>, dim3(unsigned(plan.grid)), Traits::kThreads,
                plan.shared_bytes, p.stream, p, workspace, int(backward_slices<Traits>(p)),
                gradients);
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
    if constexpr (std::is_same_v<typename Traits::Element, fp32>) {
      status = launch_fp32_backward<Traits>(p, plan, workspace);
    } else {
      status = launch(backward_kernel<Traits>, dim3(unsigned(plan.grid)), Traits::kThreads,
                      plan.shared_bytes, p.stream, p, workspace, int(backward_slices<Traits>(p)));
    }
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
