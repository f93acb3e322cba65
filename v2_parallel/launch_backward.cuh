// The backward call of this version, from parameters to grids.
#pragma once

#include <algorithm>

#include "common/backend.h"
#include "common/launch.cuh"
#include "common/passes_backward.cuh"
#include "v2_parallel/backward.cuh"
#include "v2_parallel/dq_backward.cuh"

namespace flash::v2 {

inline int64_t blocks_of(int64_t n, int block) { return (n + block - 1) / block; }

template <class Instance>
Plan plan_backward(const Problem& p) {
  using Traits = BackwardTraits<Instance>;
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

template <class Instance, bool kFeatured>
cudaError_t launch_backward_as(const BackwardParams& p) {
  using Traits = BackwardTraits<Instance, kFeatured>;
  const Plan plan = plan_backward<Instance>(p);
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
  return plain ? launch_backward_as<Instance, false>(p) : launch_backward_as<Instance, true>(p);
}

}  // namespace flash::v2
