// The calls of backend.h, dispatched over the instances that the build lists in instances.h.
#include "common/backend.h"

#include "common/dispatch.h"
#include "instances.h"  // generated: ForwardInstances and BackwardInstances of this version

namespace flash::FLASH_NAMESPACE {
namespace {

template <class... I>
void append_rows(Instances<I...>, Direction direction, std::vector<InstanceRow>& rows) {
  (rows.emplace_back(int(direction), int(kDType<typename I::Element>), I::kHeadDim, I::kHeadDimV),
   ...);
}

template <class... I>
cudaError_t probe_first(Instances<I...>) {
  return cudaErrorInvalidDeviceFunction;
}

template <class First, class... Rest>
cudaError_t probe_first(Instances<First, Rest...>) {
  return probe_forward<First>();
}

}  // namespace

cudaError_t forward(const ForwardParams& p) {
  return dispatch(ForwardInstances{}, p,
                  [&](auto instance) { return launch_forward<decltype(instance)>(p); });
}

cudaError_t backward(const BackwardParams& p) {
  return dispatch(BackwardInstances{}, p,
                  [&](auto instance) { return launch_backward<decltype(instance)>(p); });
}

Plan plan(Direction direction, const Problem& p) {
  Plan plan;
  if (direction == Direction::kForward) {
    dispatch(ForwardInstances{}, p, [&](auto instance) {
      plan = plan_forward<decltype(instance)>(p);
      return cudaSuccess;
    });
  } else {
    dispatch(BackwardInstances{}, p, [&](auto instance) {
      plan = plan_backward<decltype(instance)>(p);
      return cudaSuccess;
    });
  }
  return plan;
}

std::vector<InstanceRow> instances() {
  std::vector<InstanceRow> rows;
  append_rows(ForwardInstances{}, Direction::kForward, rows);
  append_rows(BackwardInstances{}, Direction::kBackward, rows);
  return rows;
}

cudaError_t probe() { return probe_first(ForwardInstances{}); }

}  // namespace flash::FLASH_NAMESPACE
