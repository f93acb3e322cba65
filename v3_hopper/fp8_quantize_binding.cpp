// The quantizer as a Python module of its own: plain integers in, a CUDA error code out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "v3_hopper/fp8_quantize.h"

namespace py = pybind11;

namespace flash::v3::fp8 {
namespace {

using Pointer = uintptr_t;
using ViewTuple = std::tuple<Pointer, int64_t, int64_t, int64_t>;  // data, batch, row, head
using Sizes = std::tuple<int, int, int, int, int>;  // batch, rows, heads, kv heads, block
using Places = std::tuple<Pointer, Pointer, Pointer, Pointer>;  // stored, descale, amax, lengths
using TensorTuple = std::tuple<ViewTuple, Sizes, bool, bool, bool, Places>;

QuantizeTensor tensor_of(const TensorTuple& given) {
  const auto& [source, sizes, rotate, spread, keys_first, places] = given;
  QuantizeTensor t;
  t.source = {reinterpret_cast<void*>(std::get<0>(source)), std::get<1>(source),
              std::get<2>(source), std::get<3>(source)};
  std::tie(t.batch, t.rows, t.heads, t.heads_kv, t.block_rows) = sizes;
  t.rotate = rotate;
  t.spread = spread;
  t.keys_first = keys_first;
  t.stored = reinterpret_cast<void*>(std::get<0>(places));
  t.descale = reinterpret_cast<float*>(std::get<1>(places));
  t.amax = reinterpret_cast<float*>(std::get<2>(places));
  t.cu_seqlens = reinterpret_cast<const int*>(std::get<3>(places));
  return t;
}

int quantize_tensors(int dtype, int dim, int granularity, const std::vector<TensorTuple>& tensors,
                     Pointer stream) {
  QuantizeParams p;
  if (tensors.size() > QuantizeParams::kMost) return int(cudaErrorInvalidValue);
  p.dtype = DType(dtype);
  p.dim = dim;
  p.granularity = Granularity(granularity);
  for (const TensorTuple& given : tensors) p.tensors[p.count++] = tensor_of(given);
  p.stream = reinterpret_cast<cudaStream_t>(stream);
  return int(quantize(p));
}

}  // namespace
}  // namespace flash::v3::fp8

PYBIND11_MODULE(FLASH_MODULE, m) {
  m.def("quantize", &flash::v3::fp8::quantize_tensors, py::call_guard<py::gil_scoped_release>());
  m.def("error_string",
        [](int code) { return std::string(cudaGetErrorString(cudaError_t(code))); });
}
