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

template <class Traits>
cudaError_t launch_forward_as(const ForwardParams& p) {
  const Grid grid = make_grid<Traits>(p);
  return launch(forward_kernel<Traits>, dim3(unsigned(grid.ctas)), 32 * grid.warps,
                Shared<Traits>::bytes(grid.stages, grid.warps), p.stream, p, grid);
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
  const Grid grid = make_grid<Traits>(p);
  Plan plan;
  plan.block_q = grid.warps * Traits::kRowsPerWarp;
  plan.block_kv = grid.stages * Traits::kBlockKV;
  plan.stages = grid.stages;
  plan.threads = 32 * grid.warps;
  plan.grid = grid.ctas;
  plan.shared_bytes = Shared<Traits>::bytes(grid.stages, grid.warps);
  const bool one_pass = p.seqlen_k <= plan.block_kv;  // then no state needs to travel
  const int64_t q_blocks = int64_t(grid.ctas) * grid.turns * grid.warps;
  plan.workspace_bytes = one_pass ? 0 : q_blocks * Traits::kStateFloats * int64_t(sizeof(float));
  return plan;
}

template <class Instance>
cudaError_t probe_forward() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, forward_kernel<ForwardTraits<Instance, false>>);
}

}  // namespace flash::v1
