// From parameters to kernel, grid and shared memory.
#pragma once

#include "common/backend.h"
#include "common/launch.cuh"
#include "v2_parallel/forward.cuh"
#include "v2_parallel/launch_backward.cuh"

namespace flash::v2 {

inline bool aligned(const View& v, const Problem& p) {
  const int64_t strides = v.row | v.head | (p.batch > 1 ? v.batch : 0);
  return reinterpret_cast<uint64_t>(v.data) % 16 == 0 && strides % 8 == 0;
}

template <class Traits>
cudaError_t launch_forward_as(const ForwardParams& p) {
  const Grid grid(p, Traits::kBlockQ);
  return launch(forward_kernel<Traits>, dim3(unsigned(grid.tiles())), Traits::kThreads,
                Shared<Traits>::kBytes, p.stream, p, grid);
}

template <class Instance>
cudaError_t launch_forward(const ForwardParams& p) {
  if (p.batch == 0 || p.seqlen_q == 0 || p.heads_q == 0) return cudaSuccess;
  const bool plain = p.softcap == 0.0f && p.scale > 0.0f && aligned(p.q, p) && aligned(p.k, p) &&
                     aligned(p.v, p) && aligned(p.o, p);
  return plain ? launch_forward_as<ForwardTraits<Instance, false>>(p)
               : launch_forward_as<ForwardTraits<Instance, true>>(p);
}

template <class Instance>
Plan plan_forward(const Problem& p) {
  using Traits = ForwardTraits<Instance, false>;
  Plan plan;
  plan.block_q = Traits::kBlockQ;
  plan.block_kv = Traits::kBlockKV;
  plan.stages = Traits::kStages;
  plan.threads = Traits::kThreads;
  plan.grid = Grid(p, Traits::kBlockQ).tiles();
  plan.shared_bytes = Shared<Traits>::kBytes;
  return plan;
}

template <class Instance>
cudaError_t probe_forward() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, forward_kernel<ForwardTraits<Instance, false>>);
}

}  // namespace flash::v2
