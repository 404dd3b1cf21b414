// Entry points of the emulated library for ctypes: scalars and addresses in, an error message (or
// null) out. Included at the end of the rewritten csrc/kmeans_cuda.cu.
#pragma once

#include <string>

extern "C" int64_t emulated_workspace(int64_t groups, int64_t rows, int64_t width,
                                      int64_t num_centers) {
  return spt_fast::assign_accumulate_cuda_workspace(groups, rows, width, num_centers);
}

extern "C" const char* emulated_assign_accumulate(const void* data, int32_t dtype,
                                                  const int64_t* sizes, const int64_t* strides,
                                                  const float* centers, int64_t num_centers,
                                                  const float* weights, double* sums,
                                                  double* counts, double* inertia, int32_t* labels,
                                                  float* distances, void* workspace) {
  static std::string message;
  spt_fast::AssignArgs args;
  args.tokens = {data,       static_cast<spt_fast::DType>(dtype),
                 sizes[0],   sizes[1],
                 sizes[2],   sizes[3],
                 strides[0], strides[1],
                 strides[2]};
  args.centers = centers;
  args.weights = weights;
  args.num_centers = num_centers;
  args.sums = sums;
  args.counts = counts;
  args.inertia = inertia;
  args.labels = labels;
  args.distances = distances;
  try {
    spt_fast::assign_accumulate_cuda(args, workspace, 0, nullptr);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
