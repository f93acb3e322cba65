// From parameters to kernel, grid and shared memory.
#pragma once

#include <algorithm>

#include "common/backend.h"
#include "common/launch.cuh"
#include "v1_tiling/forward.cuh"
#include "v1_tiling/launch_backward.cuh"

namespace flash::v1 {

// What the current device offers.
struct Device {
  int shared_bytes = 48 << 10, processors = 1;  // where there is none

  Device() {
    int device = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
};

// Long slices read K and V less often and let warps drift apart; short ones fill the device. The
// cost is that of the rounds of CTAs, in turns, where starting a slice costs a third of a turn.
inline void choose_slice(Grid& grid, const Problem& p, int rows_per_warp, int processors) {
  const auto up = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  const int rows = grid.warps * rows_per_warp;
  float best = 0.0f;
  for (int turns : {1, 2, 4}) {
    const int slices = int(up(p.seqlen_q, turns * rows));
    const int64_t tiles = int64_t(slices) * p.batch * p.heads_q;
    const float used_turns = float(std::min<int64_t>(turns, up(p.seqlen_q, rows)));
    const float cost = float(up(tiles, processors)) * (used_turns + 0.35f);
    if (turns > 1 && cost >= best) continue;
    best = cost;
    grid.turns = turns, grid.slice = turns * rows, grid.slices = slices, grid.tiles = tiles;
  }
  grid.ctas = int(std::min<int64_t>(grid.tiles, processors));
}

// Eight warps if at least two K/V blocks then find room beside their Q blocks, else fewer.
template <class Traits>
Grid make_grid(const Problem& p) {
  const Device device;
  Grid grid = {};
  const auto fits = [&](int stages) {
    return Shared<Traits>::bytes(stages, grid.warps) <= device.shared_bytes;
  };
  for (grid.warps = Traits::kMaxWarps; grid.warps > 3 && !fits(2);) --grid.warps;
  while (grid.warps > 1 && !fits(1)) --grid.warps;
  for (grid.stages = Traits::kMaxStages; grid.stages > 1 && !fits(grid.stages); --grid.stages) {
  }
  choose_slice(grid, p, Traits::kRowsPerWarp, device.processors);
  grid.last_first = p.window_right != kUnlimited;
  return grid;
}

inline bool aligned(const View& v, const Problem& p) {
  const int64_t strides = v.row | v.head | (p.batch > 1 ? v.batch : 0);
  const int64_t chunk = p.dtype == DType::kFloat32 ? 4 : 8;
  return reinterpret_cast<uint64_t>(v.data) % 16 == 0 && strides % chunk == 0;
}

// O, m and l of the Q blocks under way; none with a single pass.
template <class Traits>
int64_t state_bytes(const Grid& grid, const Problem& p) {
  if (p.seqlen_k <= grid.stages * Traits::kBlockKV) return 0;
  const int64_t q_blocks = int64_t(grid.ctas) * grid.turns * grid.warps;
  return (q_blocks * Traits::kStateFloats * int64_t(sizeof(float)) + 255) / 256 * 256;
}

// Q of fp32 becomes its parts, in the workspace behind the state: a row is read once for each pass
// over K and V, those but once for each slice.
template <class Traits>
cudaError_t split_query(ForwardParams& p, const Grid& grid) {
  SplitPass<Traits::kHeadDim> pass(static_cast<char*>(p.workspace) + state_bytes<Traits>(grid, p));
  const int64_t rows_q = p.cu_seqlens_q == nullptr ? p.seqlen_q : p.total_q;
  pass.add(p.q, p.q_descale, p.heads_q, p.head_dim, p.total_q, rows_q);
  return pass.run(p.stream);
}

template <class Traits>
cudaError_t launch_forward_as(ForwardParams p) {
  const Grid grid = make_grid<Traits>(p);
  if constexpr (Traits::kFloat32) {
    const cudaError_t status = split_query<Traits>(p, grid);
    if (status != cudaSuccess) return status;
  }
  return launch(forward_kernel<Traits>, dim3(unsigned(grid.ctas)), 32 * grid.warps,
                Shared<Traits>::bytes(grid.stages, grid.warps), p.stream, p, grid);
}

// Was the image that this device loads compiled for an architecture before sm_80?
template <class Instance>
bool before_ampere() {
  cudaFuncAttributes attributes;
  const auto status =
      cudaFuncGetAttributes(&attributes, forward_kernel<ForwardTraits<Instance, false>>);
  return status == cudaSuccess && attributes.ptxVersion < 80;
}

// run(traits) with those that serve the device.
template <class Instance, bool kFeatured, class Run>
auto with_traits(Run run) {
  if constexpr (std::is_same_v<typename Instance::Element, fp16>) {
    if (before_ampere<Instance>()) return run(ForwardTraits<Instance, kFeatured, true>{});
  }
  return run(ForwardTraits<Instance, kFeatured>{});
}

template <class Instance>
cudaError_t launch_forward(const ForwardParams& p) {
  if (p.batch == 0 || p.seqlen_q == 0 || p.heads_q == 0) return cudaSuccess;
  const bool plain = p.softcap == 0.0f && p.scale > 0.0f && aligned(p.q, p) && aligned(p.k, p) &&
                     aligned(p.v, p) && aligned(p.o, p);
  const auto run = [&](auto traits) { return launch_forward_as<decltype(traits)>(p); };
  return plain ? with_traits<Instance, false>(run) : with_traits<Instance, true>(run);
}

template <class Traits>
Plan plan_forward_as(const Problem& p) {
  const Grid grid = make_grid<Traits>(p);
  Plan plan;
  plan.block_q = grid.warps * Traits::kRowsPerWarp;
  plan.block_kv = grid.stages * Traits::kBlockKV;
  plan.stages = grid.stages;
  plan.threads = 32 * grid.warps;
  plan.grid = grid.ctas;
  plan.shared_bytes = Shared<Traits>::bytes(grid.stages, grid.warps);
  plan.workspace_bytes = state_bytes<Traits>(grid, p);
  if constexpr (Traits::kFloat32) {
    plan.workspace_bytes += SplitPass<Traits::kHeadDim>::bytes(p.total_q * p.heads_q);
  }
  return plan;
}

template <class Instance>
Plan plan_forward(const Problem& p) {
  return with_traits<Instance, false>(
      [&](auto traits) { return plan_forward_as<decltype(traits)>(p); });
}

template <class Instance>
cudaError_t probe_forward() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, forward_kernel<ForwardTraits<Instance, false>>);
}

}  // namespace flash::v1
