// Python bindings, and the only file that knows Python. Tensors arrive as addresses and sizes,
// which spt_fast/ops/kmeans_native.py has checked; what can be checked here is checked again.
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

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

TokenView make_view(std::uintptr_t data, int dtype, const std::array<int64_t, 4>& sizes,
                    const std::array<int64_t, 3>& strides) {
  require(dtype >= 0 && dtype <= 2, "dtype must be 0 (float32), 1 (float16) or 2 (bfloat16)");
  for (int64_t size : sizes) require(size >= 1, "tokens must not be empty");
  require(data != 0, "tokens must have an address");
  TokenView view;
  view.data = pointer<const void>(data);
  view.dtype = static_cast<DType>(dtype);
  view.groups = sizes[0];
  view.outer = sizes[1];
  view.inner = sizes[2];
  view.width = sizes[3];
  view.group_stride = strides[0];
  view.outer_stride = strides[1];
  view.inner_stride = strides[2];
  return view;
}

AssignArgs make_assign_args(const TokenView& tokens, std::uintptr_t centers, int64_t num_centers,
                            std::uintptr_t shift, std::uintptr_t weights, std::uintptr_t sums,
                            std::uintptr_t counts, std::uintptr_t inertia, std::uintptr_t labels,
                            std::uintptr_t distances) {
  require(num_centers >= 1, "num_centers must be at least 1");
  require(centers && sums && counts && inertia,
          "centers, sums, counts and inertia must have an address");
  AssignArgs args;
  args.tokens = tokens;
  args.centers = pointer<const float>(centers);
  args.shift = pointer<const float>(shift);
  args.weights = pointer<const float>(weights);
  args.num_centers = num_centers;
  args.sums = pointer<double>(sums);
  args.counts = pointer<double>(counts);
  args.inertia = pointer<double>(inertia);
  args.labels = pointer<int32_t>(labels);
  args.distances = pointer<float>(distances);
  return args;
}

DistanceArgs make_distance_args(const TokenView& tokens, std::uintptr_t centers,
                                int64_t num_centers, std::uintptr_t shift,
                                std::uintptr_t distances) {
  require(num_centers >= 1, "num_centers must be at least 1");
  require(centers && distances, "centers and distances must have an address");
  DistanceArgs args;
  args.tokens = tokens;
  args.centers = pointer<const float>(centers);
  args.shift = pointer<const float>(shift);
  args.num_centers = num_centers;
  args.distances = pointer<float>(distances);
  return args;
}

void bind_cpu(py::module_& module) {
  module.def(
      "assign_accumulate_cpu",
      [](std::uintptr_t data, int dtype, std::array<int64_t, 4> sizes,
         std::array<int64_t, 3> strides, std::uintptr_t centers, int64_t num_centers,
         std::uintptr_t shift, std::uintptr_t weights, std::uintptr_t sums, std::uintptr_t counts,
         std::uintptr_t inertia, std::uintptr_t labels, std::uintptr_t distances, int num_threads,
         const std::string& isa) {
        const AssignArgs args =
            make_assign_args(make_view(data, dtype, sizes, strides), centers, num_centers, shift,
                             weights, sums, counts, inertia, labels, distances);
        py::gil_scoped_release release;
        assign_accumulate_cpu(args, num_threads, isa);
      },
      py::arg("data"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("centers"),
      py::arg("num_centers"), py::arg("shift"), py::arg("weights"), py::arg("sums"),
      py::arg("counts"), py::arg("inertia"), py::arg("labels"), py::arg("distances"),
      py::arg("num_threads"), py::arg("isa"));
  module.def(
      "distances_cpu",
      [](std::uintptr_t data, int dtype, std::array<int64_t, 4> sizes,
         std::array<int64_t, 3> strides, std::uintptr_t centers, int64_t num_centers,
         std::uintptr_t shift, std::uintptr_t distances, int num_threads, const std::string& isa) {
        const DistanceArgs args = make_distance_args(make_view(data, dtype, sizes, strides),
                                                     centers, num_centers, shift, distances);
        py::gil_scoped_release release;
        distances_cpu(args, num_threads, isa);
      },
      py::arg("data"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("centers"),
      py::arg("num_centers"), py::arg("shift"), py::arg("distances"), py::arg("num_threads"),
      py::arg("isa"));
}

void bind_pruned_cpu(py::module_& module) {
  py::class_<PrunedPass>(module, "PrunedPass")
      .def_readonly("inertia", &PrunedPass::inertia)
      .def_readonly("evaluated", &PrunedPass::evaluated)
      .def_readonly("changed", &PrunedPass::changed)
      .def_readonly("fresh", &PrunedPass::fresh);
  py::class_<PrunedAssignCpu>(module, "PrunedAssignCpu")
      .def(py::init([](const std::vector<int64_t>& part_rows, int64_t width, std::uintptr_t shift,
                       int64_t num_centers, const std::string& isa) {
             for (int64_t rows : part_rows) require(rows >= 1, "parts must not be empty");
             require(width >= 1, "width must be at least 1");
             require(num_centers >= 1, "num_centers must be at least 1");
             return std::make_unique<PrunedAssignCpu>(part_rows, width, pointer<const float>(shift),
                                                      num_centers, isa);
           }),
           py::arg("part_rows"), py::arg("width"), py::arg("shift"), py::arg("num_centers"),
           py::arg("isa"))
      .def(
          "begin",
          [](PrunedAssignCpu& self, std::uintptr_t centers, int num_threads) {
            require(centers, "centers must have an address");
            py::gil_scoped_release release;
            return self.begin(pointer<const float>(centers), num_threads);
          },
          py::arg("centers"), py::arg("num_threads"))
      .def(
          "add",
          [](PrunedAssignCpu& self, int64_t part, std::uintptr_t data, int dtype,
             std::array<int64_t, 4> sizes, std::array<int64_t, 3> strides, std::uintptr_t weights,
             int num_threads) {
            const TokenView tokens = make_view(data, dtype, sizes, strides);
            py::gil_scoped_release release;
            self.add(part, tokens, pointer<const float>(weights), num_threads);
          },
          py::arg("part"), py::arg("data"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"),
          py::arg("weights"), py::arg("num_threads"))
      .def(
          "end",
          [](PrunedAssignCpu& self, std::uintptr_t sums, std::uintptr_t counts) {
            require(sums && counts, "sums and counts must have an address");
            return self.end(pointer<double>(sums), pointer<double>(counts));
          },
          py::arg("sums"), py::arg("counts"))
      .def("labels", &PrunedAssignCpu::labels);
}

#ifdef SPT_HAVE_CUDA
void bind_cuda(py::module_& module) {
  module.def("assign_accumulate_cuda_workspace", &assign_accumulate_cuda_workspace,
             py::arg("groups"), py::arg("rows"), py::arg("width"), py::arg("num_centers"));
  module.def(
      "assign_accumulate_cuda",
      [](std::uintptr_t data, int dtype, std::array<int64_t, 4> sizes,
         std::array<int64_t, 3> strides, std::uintptr_t centers, int64_t num_centers,
         std::uintptr_t shift, std::uintptr_t weights, std::uintptr_t sums, std::uintptr_t counts,
         std::uintptr_t inertia, std::uintptr_t labels, std::uintptr_t distances,
         std::uintptr_t workspace, int device, std::uintptr_t stream) {
        const AssignArgs args =
            make_assign_args(make_view(data, dtype, sizes, strides), centers, num_centers, shift,
                             weights, sums, counts, inertia, labels, distances);
        py::gil_scoped_release release;
        assign_accumulate_cuda(args, pointer<void>(workspace), device, pointer<void>(stream));
      },
      py::arg("data"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("centers"),
      py::arg("num_centers"), py::arg("shift"), py::arg("weights"), py::arg("sums"),
      py::arg("counts"), py::arg("inertia"), py::arg("labels"), py::arg("distances"),
      py::arg("workspace"), py::arg("device"), py::arg("stream"));
  module.def("distances_cuda_workspace", &distances_cuda_workspace, py::arg("groups"),
             py::arg("rows"), py::arg("width"), py::arg("num_centers"));
  module.def(
      "distances_cuda",
      [](std::uintptr_t data, int dtype, std::array<int64_t, 4> sizes,
         std::array<int64_t, 3> strides, std::uintptr_t centers, int64_t num_centers,
         std::uintptr_t shift, std::uintptr_t distances, std::uintptr_t workspace, int device,
         std::uintptr_t stream) {
        const DistanceArgs args = make_distance_args(make_view(data, dtype, sizes, strides),
                                                     centers, num_centers, shift, distances);
        py::gil_scoped_release release;
        distances_cuda(args, pointer<void>(workspace), device, pointer<void>(stream));
      },
      py::arg("data"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("centers"),
      py::arg("num_centers"), py::arg("shift"), py::arg("distances"), py::arg("workspace"),
      py::arg("device"), py::arg("stream"));
}
#endif

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
  spt_fast::bind_cpu(module);
  spt_fast::bind_pruned_cpu(module);
#ifdef SPT_HAVE_CUDA
  spt_fast::bind_cuda(module);
#endif
}
