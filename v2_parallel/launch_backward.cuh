// The backward call of this version, from parameters to grids.
#pragma once

#include <algorithm>

#include "common/backend.h"
#include "common/launch.cuh"
#include "common/passes_backward.cuh"
#include "v2_parallel/backward.cuh"
#include "v2_parallel/dq_backward.cuh"

namespace flash::v2 {

// Of the current device; `otherwise` where there is none to ask.
inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return otherwise;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : otherwise;
}

// GPUs other than those of data centers have 99 KiB for a CTA, an A100 163, an H100 227.
inline bool has_room(int64_t shared_bytes) {
  return shared_bytes <= (99 << 10) ||
         shared_bytes <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 1 << 30);
}

inline int64_t blocks_of(int64_t n, int block) { return (n + block - 1) / block; }

// Causal calls whose CTAs make at most 16 steps, half of them at most 8.
inline bool is_short(const Problem& p) {
  return p.window_right != kUnlimited &&
         int64_t(p.seqlen_q) * p.heads_q <= 1024 * int64_t(p.heads_kv);
}

// The kernels that serve a call: run<Traits>().
template <class Instance, class Run>
auto choose_backward(const Problem& p, bool plain, Run run) {
  using Plain = BackwardTraits<Instance>;
  using Short = BackwardTraits<Instance, false, true>;
  if constexpr (Instance::kHeadDim == 128) {
    if (plain && is_short(p) && has_room(sizeof(typename Short::Shared))) return run(Short{});
  }
  if (plain && has_room(sizeof(typename Plain::Shared))) return run(Plain{});
  return run(BackwardTraits<Instance, true>{});
}

template <class Traits>
Plan plan_backward_as(const Problem& p) {
  Plan plan;
  plan.block_q = Traits::kBlockQ, plan.block_kv = Traits::kBlockKV;
  plan.stages = Traits::kStages, plan.threads = Traits::kThreads;
  plan.grid = blocks_of(p.seqlen_k, Traits::kBlockKV) * p.heads_kv * p.batch;
  plan.shared_bytes = int(sizeof(typename Traits::Shared));
  // The larger of the dense and the packed layout: the problem does not say which it is.
  const int64_t rows = std::max(BackwardWorkspace<Traits>::padded_rows(p, false),
                                BackwardWorkspace<Traits>::padded_rows(p, true));
  plan.workspace_bytes = BackwardWorkspace<Traits>::bytes(rows, p);
  return plan;
}

template <class Instance>
Plan plan_backward(const Problem& p) {
  return choose_backward<Instance>(
      p, p.softcap == 0.0f, [&](auto traits) { return plan_backward_as<decltype(traits)>(p); });
}

template <class Traits>
cudaError_t launch_backward_as(const BackwardParams& p) {
  const Plan plan = plan_backward_as<Traits>(p);
  const BackwardWorkspace<Traits> workspace(p);
  const int row_blocks = int(blocks_of(p.seqlen_q, Traits::kBlockQ));
  const int64_t row_grid = int64_t(row_blocks) * p.heads_q * p.batch;
  const int key_blocks = int(blocks_of(p.seqlen_k, Traits::kBlockKV));
  cudaError_t status = cudaSuccess;
  if (row_grid > 0) {
    status = launch(prepare_kernel<Traits>, dim3(unsigned(row_grid)), kPassThreads, 0, p.stream, p,
                    workspace, row_blocks);
  }
  if (status == cudaSuccess && plan.grid > 0) {
    // Heads whose Q, dO and dQ fit in half of a large L2 together.
    const int64_t head_bytes =
        int64_t(std::max(p.seqlen_q, 1)) * (p.heads_q / p.heads_kv) * Traits::kHeadDim * 8;
    const int group = int(std::clamp<int64_t>((int64_t(32) << 20) / head_bytes, 1, 1 << 20));
    const auto kernel =
        workspace.dq != nullptr ? backward_kernel<Traits, true> : backward_kernel<Traits, false>;
    status = launch(kernel, dim3(unsigned(plan.grid)), Traits::kThreads, plan.shared_bytes,
                    p.stream, p, workspace, key_blocks, group);
  }
  if (status == cudaSuccess && row_grid > 0 && p.deterministic) {
    const int dq_blocks = int(blocks_of(p.seqlen_q, Traits::kBlockKV));
    const int64_t dq_grid = int64_t(dq_blocks) * p.heads_q * p.batch;
    status = launch(dq_kernel<Traits>, dim3(unsigned(dq_grid)), Traits::kThreads, plan.shared_bytes,
                    p.stream, p, workspace, dq_blocks);
  } else if (status == cudaSuccess && row_grid > 0) {
    status = launch(finish_kernel<Traits>, dim3(unsigned(row_grid)), kPassThreads, 0, p.stream, p,
                    workspace, row_blocks);
  }
  return status;
}

inline bool rows_aligned(const View& v, const Problem& p) {
  const int64_t strides = v.row | v.head | (p.batch > 1 ? v.batch : 0);
  return reinterpret_cast<uint64_t>(v.data) % 16 == 0 && strides % 8 == 0;
}

template <class Instance>
cudaError_t launch_backward(const BackwardParams& p) {
  bool plain = p.softcap == 0.0f;
  for (const View* v : {&p.q, &p.k, &p.v, &p.o, &p.dout, &p.dq, &p.dk, &p.dv}) {
    plain = plain && rows_aligned(*v, p);
  }
  return choose_backward<Instance>(
      p, plain, [&](auto traits) { return launch_backward_as<decltype(traits)>(p); });
}

}  // namespace flash::v2
