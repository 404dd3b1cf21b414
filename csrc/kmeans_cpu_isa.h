// What each instruction set's translation unit offers to the CPU driver: a table of functions.
#pragma once

#include <cstdint>

#include "kmeans.h"

namespace spt_fast {

// Tokens of one group, as a kernel sees them: token m = i * inner + j starts at element i *
// outer_stride + j * inner_stride of base. Kernels work on float32 values less the shift.
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
  const float* panels;      // [padded_centers * D]
  const float* half_norms;  // [padded_centers] |c - shift|^2 / 2, infinite in the padding
  int64_t num_centers;
};

// What is known about the distances of the tokens of one group; see kmeans_cpu_pruned.cpp.
struct TokenBounds {
  int32_t* labels;     // [M] nearest centre, -1 before the first pass
  float* norms;        // [M] |x - shift|^2 as computed
  float* upper;        // [M] at least the distance to the token's centre; null: labels alone
  float* lower;        // [M, bound_groups] at most the distance to any other centre of the group
  float unit_error;    // unit_error * (norms[m] + largest_norm) bounds a squared distance's error
  float largest_norm;  // largest |c - shift|^2
};

// Whether a centre that is at least `lower` away also has a larger *computed* distance than one
// that is at most `upper` away: lower^2 - upper^2 > 2 error, where `error` bounds the error of
// either squared distance. False for NaN.
static inline bool certainly_farther(float lower, float upper, float error) {
  constexpr float kSlack = 1.f - 1.f / (1 << 20);  // more than the rounding of this expression
  return (lower - upper) * (lower + upper) * kSlack > 2.f * error;
}

// One thread's share of assign-and-accumulate: rows [begin, end) of a group.
struct AssignShare {
  GroupTokens tokens;
  PackedCenters centers;  // wide layout
  int64_t begin, end;
  const float* weights;       // [M] of the group, or null
  float* scratch;             // scratch_floats()
  double* sums;               // INOUT [K, D], in shifted coordinates
  double* counts;             // INOUT [K]
  double* inertia;            // INOUT [1]
  int32_t* labels;            // OUT [M] of the group, or null
  float* distances;           // OUT [M] of the group, or null
  const TokenBounds* bounds;  // OUT, or null
  double* weighted_norms;     // INOUT [1] weighted sum of the norms; with bounds only
  int64_t* num_changed;       // INOUT [1] labels unlike those that bounds held; with bounds only
};

// One thread's share of a pass that prunes: tokens that may have come nearer to another centre.
struct RefineShare {
  GroupTokens tokens;
  PackedCenters centers;  // grouped layout
  int64_t begin;
  const uint16_t* rows;  // [count], counted from begin
  int64_t count;
  TokenBounds bounds;      // INOUT
  float* scratch;          // refine_floats()
  uint16_t* changed_rows;  // OUT rows that changed to another centre, counted from begin
  int32_t* old_labels;     // OUT the centres that they had
};

// One thread's share of correcting the sums: the tokens that join or leave one centre, in columns
// [first, last).
struct MoveShare {
  GroupTokens tokens;
  const int64_t* moves;  // [count] m where the token joins, -m - 1 where it leaves
  int64_t count;
  int64_t first, last;
  const float* weights;  // [M], or null
  float* scratch;        // [last - first]
  double* sum;           // INOUT [D] of the centre, in shifted coordinates
};

// One thread's share of all squared distances: rows [begin, end) of a group.
struct DistanceShare {
  GroupTokens tokens;
  PackedCenters centers;  // wide layout
  int64_t begin, end;
  float* scratch;    // scratch_floats()
  float* distances;  // OUT [M, K] of the group
};

// Wide panels fill the registers; a grouped panel holds the centres that share a lower bound.
enum class Layout { kWide, kGrouped };

struct CpuKernels {
  const char* name;
  int64_t bound_group;  // how many adjacent centres share a lower bound
  int64_t (*padded_centers)(int64_t num_centers, Layout layout);
  int64_t (*scratch_floats)(int64_t width, int64_t num_centers);
  int64_t (*refine_floats)(int64_t width);
  // panels: [padded_centers * D], half_norms: [padded_centers].
  void (*pack)(const float* centers, const float* shift, int64_t num_centers, int64_t width,
               Layout layout, float* panels, float* half_norms);
  void (*assign)(const AssignShare& share);
  int64_t (*refine)(const RefineShare& share);  // returns how many changed
  void (*move)(const MoveShare& share);
  void (*distances)(const DistanceShare& share);
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
