// From run-time (dtype, head dim) to the compiled instance that serves it, without macros.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "common/params.h"

namespace flash {

using fp16 = __half;
using bf16 = __nv_bfloat16;
using fp32 = float;
using e4m3 = __nv_fp8_e4m3;

template <class T>
inline constexpr DType kDType = DType::kFloat32;
template <>
inline constexpr DType kDType<fp16> = DType::kFloat16;
template <>
inline constexpr DType kDType<bf16> = DType::kBFloat16;
template <>
inline constexpr DType kDType<e4m3> = DType::kFloat8E4M3;

// One compiled kernel: element type, head dim of Q and K, head dim of V.
template <class T, int kDim, int kDimV = kDim>
struct Instance {
  using Element = T;
  static constexpr int kHeadDim = kDim;
  static constexpr int kHeadDimV = kDimV;
};

template <class... I>
struct Instances {};

// Calls run(instance) for the first listed instance that fits; cudaErrorInvalidDeviceFunction when
// none was built. Lists run from the smallest head dim up, so the first fit wastes least.
template <class... I, class Run>
cudaError_t dispatch(Instances<I...>, const Problem& p, Run run) {
  cudaError_t status = cudaErrorInvalidDeviceFunction;
  [[maybe_unused]] auto try_one = [&](auto instance) {
    using Candidate = decltype(instance);
    const bool fits = kDType<typename Candidate::Element> == p.dtype &&
                      p.head_dim <= Candidate::kHeadDim && p.head_dim_v <= Candidate::kHeadDimV;
    if (fits) status = run(instance);
    return fits;
  };
  (void)(try_one(I{}) || ...);
  return status;
}

}  // namespace flash
