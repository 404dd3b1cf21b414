// Python bindings, and the only file that knows Python. Arrays arrive as addresses, which
// spt_fast/ops/kmeans_native.py has checked; what can be checked here is checked again.
//
// The types of the module are written down in spt_fast/_kmeans.pyi, and a test compares the two.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kmeans.h"

namespace py = pybind11;

namespace spt_fast {
namespace {

using Address = std::uintptr_t;  // 0: the array is left out
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

DType dtype_from_name(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw std::invalid_argument("dtype must be float32, float16 or bfloat16, got " + name);
}

TokenView make_view(Address data, const std::string& dtype, const std::array<int64_t, 4>& sizes,
                    const std::array<int64_t, 3>& strides) {
  require(data, "tokens must have an address");
  for (int64_t size : sizes) require(size >= 1, "tokens must not be empty");
  TokenView view;
  view.data = pointer<const void>(data);
  view.dtype = dtype_from_name(dtype);
  view.groups = sizes[0];
  view.outer = sizes[1];
  view.inner = sizes[2];
  view.width = sizes[3];
  view.group_stride = strides[0];
  view.outer_stride = strides[1];
  view.inner_stride = strides[2];
  return view;
}

AssignArgs make_assign_args(const TokenView& tokens, Address centers, int64_t num_centers,
                            Address sums, Address counts, Address inertia, Address shift,
                            Address weights, Address labels, Address distances, bool corrects) {
  require(num_centers >= 1, "num_centers must be at least 1");
  require(centers && sums && counts && inertia,
          "centers, sums, counts and inertia must have an address");
  require(!corrects || (labels && !weights), "corrects needs labels, and takes no weights");
  AssignArgs args;
  args.tokens = tokens;
  args.centers = pointer<const float>(centers);
  args.num_centers = num_centers;
  args.sums = pointer<double>(sums);
  args.counts = pointer<double>(counts);
  args.inertia = pointer<double>(inertia);
  args.shift = pointer<const float>(shift);
  args.weights = pointer<const float>(weights);
  args.labels = pointer<int32_t>(labels);
  args.distances = pointer<float>(distances);
  args.corrects = corrects;
  return args;
}

DistanceArgs make_distance_args(const TokenView& tokens, Address centers, int64_t num_centers,
                                Address distances, Address shift) {
  require(num_centers >= 1, "num_centers must be at least 1");
  require(centers && distances, "centers and distances must have an address");
  DistanceArgs args;
  args.tokens = tokens;
  args.centers = pointer<const float>(centers);
  args.num_centers = num_centers;
  args.distances = pointer<float>(distances);
  args.shift = pointer<const float>(shift);
  return args;
}

void bind_arguments(py::module_& module) {
  py::class_<TokenView>(module, "TokenView")
      .def(py::init(&make_view), py::kw_only(), py::arg("data"), py::arg("dtype"), py::arg("sizes"),
           py::arg("strides"));
  py::class_<AssignArgs>(module, "AssignArgs")
      .def(py::init(&make_assign_args), py::kw_only(), py::arg("tokens"), py::arg("centers"),
           py::arg("num_centers"), py::arg("sums"), py::arg("counts"), py::arg("inertia"),
           py::arg("shift") = 0, py::arg("weights") = 0, py::arg("labels") = 0,
           py::arg("distances") = 0, py::arg("corrects") = false);
  py::class_<DistanceArgs>(module, "DistanceArgs")
      .def(py::init(&make_distance_args), py::kw_only(), py::arg("tokens"), py::arg("centers"),
           py::arg("num_centers"), py::arg("distances"), py::arg("shift") = 0);
}

void bind_cpu(py::module_& module) {
  module.def("assign_accumulate_cpu", &assign_accumulate_cpu, py::arg("args"),
             py::arg("num_threads"), py::arg("isa"), ReleaseGil());
  module.def("distances_cpu", &distances_cpu, py::arg("args"), py::arg("num_threads"),
             py::arg("isa"), ReleaseGil());
}

void bind_pruned_passes(py::module_& module) {
  py::class_<PassReport>(module, "PassReport")
      .def_readonly("inertia", &PassReport::inertia)
      .def_readonly("tokens_read", &PassReport::tokens_read)
      .def_readonly("tokens_changed", &PassReport::tokens_changed)
      .def_readonly("read_all", &PassReport::read_all);
  py::class_<PrunedPasses>(module, "PrunedPasses")
      .def(py::init([](const std::vector<int64_t>& chunk_rows, int64_t width, Address shift,
                       int64_t num_centers, const std::string& isa) {
             for (int64_t rows : chunk_rows) require(rows >= 1, "chunks must not be empty");
             require(width >= 1, "width must be at least 1");
             require(num_centers >= 1, "num_centers must be at least 1");
             return std::make_unique<PrunedPasses>(chunk_rows, width, pointer<const float>(shift),
                                                   num_centers, isa);
           }),
           py::kw_only(), py::arg("chunk_rows"), py::arg("width"), py::arg("shift"),
           py::arg("num_centers"), py::arg("isa"))
      .def(
          "begin",
          [](PrunedPasses& self, Address centers, int num_threads) {
            require(centers, "centers must have an address");
            return self.begin(pointer<const float>(centers), num_threads);
          },
          py::arg("centers"), py::arg("num_threads"), ReleaseGil())
      .def(
          "add",
          [](PrunedPasses& self, int64_t chunk, const TokenView& tokens, Address weights,
             int num_threads) {
            self.add(chunk, tokens, pointer<const float>(weights), num_threads);
          },
          py::arg("chunk"), py::arg("tokens"), py::arg("weights"), py::arg("num_threads"),
          ReleaseGil())
      .def(
          "end",
          [](PrunedPasses& self, Address sums, Address counts) {
            require(sums && counts, "sums and counts must have an address");
            return self.end(pointer<double>(sums), pointer<double>(counts));
          },
          py::arg("sums"), py::arg("counts"))
      .def("labels", &PrunedPasses::labels);
}

void bind_cuda(py::module_& module) {
  module.def("cuda_why_not", &cuda_why_not);
  module.def("assign_accumulate_cuda_workspace", &assign_accumulate_cuda_workspace,
             py::arg("args"));
  module.def(
      "assign_accumulate_cuda",
      [](const AssignArgs& args, Address workspace, Address stream) {
        assign_accumulate_cuda(args, pointer<void>(workspace), pointer<void>(stream));
      },
      py::arg("args"), py::arg("workspace"), py::arg("stream"), ReleaseGil());
  module.def("distances_cuda_workspace", &distances_cuda_workspace, py::arg("args"));
  module.def(
      "distances_cuda",
      [](const DistanceArgs& args, Address workspace, Address stream) {
        distances_cuda(args, pointer<void>(workspace), pointer<void>(stream));
      },
      py::arg("args"), py::arg("workspace"), py::arg("stream"), ReleaseGil());
}

py::dict build_info() {
  py::dict info;
  info["isas"] = cpu_isas();
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef SPT_HAVE_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = SPT_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
#endif
#ifdef __VERSION__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  return info;
}

}  // namespace
}  // namespace spt_fast

PYBIND11_MODULE(_kmeans, module) {
  module.doc() = "Compiled k-means kernels of spt_fast; private, use spt_fast.ops.kmeans.";
  module.def("build_info", &spt_fast::build_info);
  spt_fast::bind_arguments(module);
  spt_fast::bind_cpu(module);
  spt_fast::bind_pruned_passes(module);
  spt_fast::bind_cuda(module);
}
