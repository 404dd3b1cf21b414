// What each instruction set's translation unit offers to the CPU driver: a table of functions.
#pragma once

#include <cstdint>

#include "kmeans.h"

namespace spt_fast {

// Tokens of one group, seen by a kernel: element d of token m is base[offset(m) + d].
struct GroupTokens {
  const void* base;
  DType dtype;
  int64_t inner;
  int64_t width;
  int64_t outer_stride;
  int64_t inner_stride;
  const float* shift;  // [D] or null
};

// Centres in the panel layout of one instruction set; see pack() in kmeans_cpu_isa.cpp.
struct PackedCenters {
  const float* panels;
  const float* half_norms;  // |c - shift|^2 / 2, +inf in the padding
  int64_t num_centers;
};

// Rows [begin, end) of a group. The float32 sums hold one chunk only; the driver adds them up in
// float64.
struct AssignChunk {
  GroupTokens tokens;
  PackedCenters centers;
  int64_t begin, end;
  const float* weights;  // [M] of the group, or null
  float* scratch;        // scratch_floats(D)
  float* sums;           // INOUT [K, D], in shifted coordinates
  double* counts;        // INOUT [K]
  double* inertia;       // INOUT [1]
  int32_t* labels;       // OUT [M] of the group, or null
  float* distances;      // OUT [M] of the group, or null
};

struct DistanceChunk {
  GroupTokens tokens;
  PackedCenters centers;
  int64_t begin, end;
  float* scratch;    // scratch_floats(D)
  float* distances;  // OUT [M, K] of the group
};

struct CpuKernels {
  const char* name;
  int64_t (*padded_centers)(int64_t num_centers);
  int64_t (*scratch_floats)(int64_t width);
  // panels: [padded_centers * D], half_norms: [padded_centers].
  void (*pack)(const float* centers, const float* shift, int64_t num_centers, int64_t width,
               float* panels, float* half_norms);
  void (*assign)(const AssignChunk& chunk);
  void (*distances)(const DistanceChunk& chunk);
};

namespace baseline {
const CpuKernels& kernels();
}
#ifdef SPT_HAVE_X86_ISAS
namespace avx2 {
const CpuKernels& kernels();
}
namespace avx512 {
const CpuKernels& kernels();
}
#endif

}  // namespace spt_fast
