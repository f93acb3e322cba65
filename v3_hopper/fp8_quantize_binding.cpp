// The quantizer as a Python module of its own: plain integers in, a CUDA error code out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "v3_hopper/fp8_quantize.h"

namespace py = pybind11;

namespace flash::v3::fp8 {
namespace {

using Pointer = uintptr_t;
using ViewTuple = std::tuple<Pointer, int64_t, int64_t, int64_t>;  // data, batch, row, head
using Sizes = std::tuple<int, int, int, int, int>;                 // batch, rows, heads, kv, dim

int quantize_tensor(int dtype, const ViewTuple& source, const Sizes& sizes, int block_rows,
                    int granularity, bool rotate, Pointer stored, Pointer descale, Pointer amax,
                    Pointer cu_seqlens, Pointer stream) {
  QuantizeParams p;
  p.dtype = DType(dtype);
  p.source = {reinterpret_cast<void*>(std::get<0>(source)), std::get<1>(source),
              std::get<2>(source), std::get<3>(source)};
  std::tie(p.batch, p.rows, p.heads, p.heads_kv, p.dim) = sizes;
  p.block_rows = block_rows;
  p.granularity = Granularity(granularity);
  p.rotate = rotate;
  p.stored = reinterpret_cast<void*>(stored);
  p.descale = reinterpret_cast<float*>(descale);
  p.amax = reinterpret_cast<float*>(amax);
  p.cu_seqlens = reinterpret_cast<const int*>(cu_seqlens);
  p.stream = reinterpret_cast<cudaStream_t>(stream);
  return int(quantize(p));
}

}  // namespace
}  // namespace flash::v3::fp8

PYBIND11_MODULE(FLASH_MODULE, m) {
  m.def("quantize", &flash::v3::fp8::quantize_tensor, py::call_guard<py::gil_scoped_release>());
  m.def("error_string",
        [](int code) { return std::string(cudaGetErrorString(cudaError_t(code))); });
}
