// One backend as a Python module: plain integers in, a CUDA error code out. Compiled once per
// version, with FLASH_NAMESPACE (v1, v2, v3) and FLASH_MODULE (the module's name) from CMake.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "common/backend.h"

namespace py = pybind11;

namespace flash {
namespace {

namespace version = FLASH_NAMESPACE;
using Pointer = uintptr_t;
using ViewTuple = std::tuple<Pointer, int64_t, int64_t, int64_t>;  // data, batch, row, head
using StatsTuple = std::tuple<Pointer, int64_t, int64_t>;          // data, batch, head
using DescaleTuple =
    std::tuple<Pointer, int64_t, int64_t, int64_t, int>;  // batch, block, head, rows

View view(const ViewTuple& t) {
  return {reinterpret_cast<void*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

RowStats stats(const StatsTuple& t) {
  return {reinterpret_cast<float*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

Descale descale(const DescaleTuple& t) {
  return {reinterpret_cast<const float*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t),
          std::get<3>(t), std::get<4>(t)};
}

template <class Params>
Params start(const Problem& problem, Pointer cu_q, Pointer cu_k, Pointer workspace,
             Pointer stream) {
  Params p;
  static_cast<Problem&>(p) = problem;
  p.cu_seqlens_q = reinterpret_cast<const int*>(cu_q);
  p.cu_seqlens_k = reinterpret_cast<const int*>(cu_k);
  p.workspace = reinterpret_cast<void*>(workspace);
  p.stream = reinterpret_cast<cudaStream_t>(stream);
  return p;
}

int forward(const Problem& problem, const ViewTuple& q, const ViewTuple& k, const ViewTuple& v,
            const ViewTuple& o, const StatsTuple& lse, Pointer cu_q, Pointer cu_k,
            const DescaleTuple& q_descale, const DescaleTuple& k_descale,
            const DescaleTuple& v_descale, Pointer workspace, Pointer stream) {
  auto p = start<ForwardParams>(problem, cu_q, cu_k, workspace, stream);
  p.q = view(q), p.k = view(k), p.v = view(v), p.o = view(o);
  p.lse = stats(lse);
  p.q_descale = descale(q_descale);
  p.k_descale = descale(k_descale);
  p.v_descale = descale(v_descale);
  return int(version::forward(p));
}

int backward(const Problem& problem, const ViewTuple& q, const ViewTuple& k, const ViewTuple& v,
             const ViewTuple& o, const ViewTuple& dout, const ViewTuple& dq, const ViewTuple& dk,
             const ViewTuple& dv, const StatsTuple& lse, const StatsTuple& dlse, Pointer cu_q,
             Pointer cu_k, Pointer workspace, Pointer stream) {
  auto p = start<BackwardParams>(problem, cu_q, cu_k, workspace, stream);
  p.q = view(q), p.k = view(k), p.v = view(v), p.o = view(o);
  p.dout = view(dout), p.dq = view(dq), p.dk = view(dk), p.dv = view(dv);
  p.lse = stats(lse), p.dlse = stats(dlse);
  return int(version::backward(p));
}

// A plain dense call of settled shapes and strides: addresses and a stream are all it still needs.
template <class Params, cudaError_t (*kRun)(const Params&), View Params::*... kViews>
class Dense {
 public:
  template <View Params::*>
  using Each = Pointer;
  template <View Params::*>
  using Like = ViewTuple;

  Dense(const Problem& problem, const StatsTuple& lse, const Like<kViews>&... views) {
    static_cast<Problem&>(p_) = problem;
    p_.lse = stats(lse);
    ((p_.*kViews = view(views)), ...);
  }

  int operator()(Pointer workspace, Pointer stream, Pointer lse, Each<kViews>... data) const {
    Params p = p_;
    p.workspace = reinterpret_cast<void*>(workspace);
    p.stream = reinterpret_cast<cudaStream_t>(stream);
    p.lse.data = reinterpret_cast<float*>(lse);
    (((p.*kViews).data = reinterpret_cast<void*>(data)), ...);
    return int(kRun(p));
  }

  static void bind(py::module_& m, const char* name) {
    py::class_<Dense>(m, name, py::module_local())
        .def(py::init<const Problem&, const StatsTuple&, const Like<kViews>&...>())
        .def("__call__", &Dense::operator(), py::call_guard<py::gil_scoped_release>());
  }

 private:
  Params p_;
};

using F = ForwardParams;
using B = BackwardParams;
using DenseForward = Dense<F, &version::forward, &F::q, &F::k, &F::v, &F::o>;
using DenseBackward =
    Dense<B, &version::backward, &B::q, &B::k, &B::v, &B::o, &B::dout, &B::dq, &B::dk, &B::dv>;

py::dict plan(int direction, const Problem& problem) {
  const Plan plan = version::plan(Direction(direction), problem);
  py::dict d;
  d["block_q"] = plan.block_q, d["block_kv"] = plan.block_kv, d["stages"] = plan.stages;
  d["threads"] = plan.threads, d["grid"] = plan.grid, d["shared_bytes"] = plan.shared_bytes;
  d["workspace_bytes"] = plan.workspace_bytes;
  return d;
}

void bind_problem(py::module_& m) {
  py::class_<Problem>(m, "Problem", py::module_local())
      .def(py::init<>())
      .def_property(
          "dtype", [](const Problem& p) { return int(p.dtype); },
          [](Problem& p, int dtype) { p.dtype = DType(dtype); })
      .def_readwrite("batch", &Problem::batch)
      .def_readwrite("heads_q", &Problem::heads_q)
      .def_readwrite("heads_kv", &Problem::heads_kv)
      .def_readwrite("seqlen_q", &Problem::seqlen_q)
      .def_readwrite("seqlen_k", &Problem::seqlen_k)
      .def_readwrite("total_q", &Problem::total_q)
      .def_readwrite("total_k", &Problem::total_k)
      .def_readwrite("head_dim", &Problem::head_dim)
      .def_readwrite("head_dim_v", &Problem::head_dim_v)
      .def_readwrite("scale", &Problem::scale)
      .def_readwrite("softcap", &Problem::softcap)
      .def_readwrite("window_left", &Problem::window_left)
      .def_readwrite("window_right", &Problem::window_right)
      .def_readwrite("top_left", &Problem::top_left)
      .def_readwrite("deterministic", &Problem::deterministic);
}

}  // namespace
}  // namespace flash

PYBIND11_MODULE(FLASH_MODULE, m) {
  using namespace flash;
  bind_problem(m);
  DenseForward::bind(m, "DenseForward");
  DenseBackward::bind(m, "DenseBackward");
  m.def("forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("backward", &backward, py::call_guard<py::gil_scoped_release>());
  m.def("instances", &version::instances, "(direction, dtype, head_dim, head_dim_v) per kernel");
  m.def("plan", &plan, "tile, stages, threads, grid and shared bytes of a call");
  m.def("probe", [] { return int(version::probe()); }, "0 when this device can run this module");
  m.def("error_string",
        [](int code) { return std::string(cudaGetErrorString(cudaError_t(code))); });
}
