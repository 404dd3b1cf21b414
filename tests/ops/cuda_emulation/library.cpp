// The emulated library: csrc/kmeans_cuda.cu on the CPU, with entry points for ctypes. Scalars and
// addresses in; an error message, or null, out.
#include <string>

#include "../../csrc/kmeans_cuda.cu"

namespace {

spt_fast::TokenView make_view(const void* data, int32_t dtype, const int64_t* sizes,
                              const int64_t* strides) {
  return {data,       static_cast<spt_fast::DType>(dtype),
          sizes[0],   sizes[1],
          sizes[2],   sizes[3],
          strides[0], strides[1],
          strides[2]};
}

template <typename Call>
const char* message_of(const Call& call) {
  static std::string message;
  try {
    call();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {

void emulated_machine(int shared_memory, int backwards) {
  emulation::shared_limit = shared_memory;
  emulation::backwards = backwards;
}

int64_t emulated_assign_accumulate_workspace(int64_t groups, int64_t rows, int64_t width,
                                             int64_t num_centers) {
  return spt_fast::assign_accumulate_cuda_workspace(groups, rows, width, num_centers);
}

int64_t emulated_distances_workspace(int64_t groups, int64_t rows, int64_t width,
                                     int64_t num_centers) {
  return spt_fast::distances_cuda_workspace(groups, rows, width, num_centers);
}

const char* emulated_assign_accumulate(const void* data, int32_t dtype, const int64_t* sizes,
                                       const int64_t* strides, const float* centers,
                                       int64_t num_centers, const float* shift,
                                       const float* weights, double* sums, double* counts,
                                       double* inertia, int32_t* labels, float* distances,
                                       void* workspace) {
  spt_fast::AssignArgs args;
  args.tokens = make_view(data, dtype, sizes, strides);
  args.centers = centers;
  args.shift = shift;
  args.weights = weights;
  args.num_centers = num_centers;
  args.sums = sums;
  args.counts = counts;
  args.inertia = inertia;
  args.labels = labels;
  args.distances = distances;
  return message_of([&] { spt_fast::assign_accumulate_cuda(args, workspace, 0, nullptr); });
}

const char* emulated_distances(const void* data, int32_t dtype, const int64_t* sizes,
                               const int64_t* strides, const float* centers, int64_t num_centers,
                               const float* shift, float* distances, void* workspace) {
  spt_fast::DistanceArgs args;
  args.tokens = make_view(data, dtype, sizes, strides);
  args.centers = centers;
  args.shift = shift;
  args.num_centers = num_centers;
  args.distances = distances;
  return message_of([&] { spt_fast::distances_cuda(args, workspace, 0, nullptr); });
}

}  // extern "C"
