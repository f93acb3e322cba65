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

// Sequences of many lengths leave their order to the hardware, equal ones keep their CTAs.
template <class Traits>
Grid forward_grid(const Problem& p, bool packed) {
  const Grid grid(p, Traits::kBlockQ);
  if (!Traits::kPersistent || packed) return grid;
  const int ctas = device_attribute(cudaDevAttrMultiProcessorCount, 0);
  return ctas > 0 && grid.tiles() > ctas ? Grid(p, Traits::kBlockQ, ctas) : grid;
}

template <class Traits>
cudaError_t launch_forward_as(const ForwardParams& p) {
  const Grid grid = forward_grid<Traits>(p, p.cu_seqlens_q != nullptr || p.cu_seqlens_k != nullptr);
  return launch(forward_kernel<Traits>, dim3(unsigned(grid.launched())), Traits::kThreads,
                Shared<Traits>::kBytes, p.stream, p, grid);
}

// Does the tile of plain scores fit?
template <class Traits>
bool fits() {
  return has_room(Shared<Traits>::kBytes + Work<Traits>::kBytes);
}

template <class Instance>
cudaError_t launch_forward(const ForwardParams& p) {
  if (p.batch == 0 || p.seqlen_q == 0 || p.heads_q == 0) return cudaSuccess;
  const bool plain = p.softcap == 0.0f && p.scale > 0.0f && aligned(p.q, p) && aligned(p.k, p) &&
                     aligned(p.v, p) && aligned(p.o, p);
  return plain && fits<ForwardTraits<Instance, false>>()
             ? launch_forward_as<ForwardTraits<Instance, false>>(p)
             : launch_forward_as<ForwardTraits<Instance, true>>(p);
}

template <class Traits>
Plan plan_forward_as(const Problem& p) {
  Plan plan;
  plan.block_q = Traits::kBlockQ;
  plan.block_kv = Traits::kBlockKV;
  plan.stages = Traits::kStages;
  plan.threads = Traits::kThreads;
  plan.grid = forward_grid<Traits>(p, false).launched();
  plan.shared_bytes = Shared<Traits>::kBytes;
  return plan;
}

template <class Instance>
Plan plan_forward(const Problem& p) {
  const bool plain = p.softcap == 0.0f && p.scale > 0.0f;
  return plain && fits<ForwardTraits<Instance, false>>()
             ? plan_forward_as<ForwardTraits<Instance, false>>(p)
             : plan_forward_as<ForwardTraits<Instance, true>>(p);
}

template <class Instance>
cudaError_t probe_forward() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, forward_kernel<ForwardTraits<Instance, false>>);
}

}  // namespace flash::v2
