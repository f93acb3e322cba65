// What every version offers to the binding: the whole interface between Python and a generation.
// FLASH_NAMESPACE (v1, v2 or v3) is defined by the build.
#pragma once

#include <tuple>
#include <vector>

#include "common/params.h"

namespace flash {

enum class Direction : int { kForward = 0, kBackward = 1 };

// One kernel that was built: direction, dtype, head dim of Q and K, head dim of V.
using InstanceRow = std::tuple<int, int, int, int>;

// How a call would run: rows and keys of a tile, K/V stages, threads, CTAs, bytes.
struct Plan {
  int block_q = 0, block_kv = 0, stages = 0, threads = 0;
  int64_t grid = 0;
  int shared_bytes = 0;
  int64_t workspace_bytes = 0;
};

namespace FLASH_NAMESPACE {

// Called by the binding; implemented once for all versions in backend.cpp.
cudaError_t forward(const ForwardParams& p);
cudaError_t backward(const BackwardParams& p);
Plan plan(Direction direction, const Problem& p);  // zeros when no instance serves p
std::vector<InstanceRow> instances();
cudaError_t probe();  // can this device load a kernel of this module?

// Implemented by each version in its launch.cuh, one translation unit per instance.
template <class Instance>
cudaError_t launch_forward(const ForwardParams& p);
template <class Instance>
Plan plan_forward(const Problem& p);
template <class Instance>
cudaError_t probe_forward();
template <class Instance>
cudaError_t launch_backward(const BackwardParams& p);
template <class Instance>
Plan plan_backward(const Problem& p);

}  // namespace FLASH_NAMESPACE
}  // namespace flash
