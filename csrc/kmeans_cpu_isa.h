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

// What is known about the distances of the tokens of one group; see kmeans_cpu_pruned.cpp.
struct TokenBounds {
  int32_t* labels;     // [M] nearest centre, -1 before the first pass
  float* norms;        // [M] |x - shift|^2 as computed
  float* upper;        // [M] at least the distance to the token's centre; null: labels alone
  float* lower;        // [M, bound_groups] at most the distance to any other centre of the group
  float unit_error;    // times norms[m] + largest_norm: bound on the error of a squared distance
  float largest_norm;  // largest |c - shift|^2
};

// Whether computed distances are sure to put a centre at least `lower` away behind one at most
// `upper` away, given the bound on the error of a squared distance. False for NaN.
static inline bool certainly_farther(float lower, float upper, float error) {
  constexpr float kSlack = 1.f - 1.f / (1 << 20);
  return (lower - upper) * (lower + upper) * kSlack > 2.f * error;
}

// Rows [begin, end) of a group.
struct AssignChunk {
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
  double* total;              // INOUT [1] weighted sum of the norms; with bounds only
  int64_t* changed;           // INOUT [1] labels unlike those in bounds before; with bounds only
};

// Tokens of one chunk that may have another centre than before.
struct RefineChunk {
  GroupTokens tokens;
  PackedCenters centers;  // grouped layout
  int64_t begin;
  const uint16_t* rows;  // [count], counted from begin
  int64_t count;
  TokenBounds bounds;  // INOUT
  float* scratch;      // refine_floats()
  uint16_t* changed;   // OUT rows that changed to another centre, counted from begin
  int32_t* before;     // OUT their centres before
};

// Tokens that come to or leave one centre, in columns [first, last).
struct MoveChunk {
  GroupTokens tokens;
  const int64_t* moves;  // [count] m where the token comes, -m - 1 where it leaves
  int64_t count;
  int64_t first, last;
  const float* weights;  // [M], or null
  float* scratch;        // [last - first]
  double* sum;           // INOUT [D] of the centre, in shifted coordinates
};

struct DistanceChunk {
  GroupTokens tokens;
  PackedCenters centers;  // wide layout
  int64_t begin, end;
  float* scratch;    // scratch_floats()
  float* distances;  // OUT [M, K] of the group
};

// Wide panels make the most of the registers; grouped ones hold one group of bounds each.
enum class Layout { kWide, kGrouped };

struct CpuKernels {
  const char* name;
  int64_t bound_group;  // centres that share a lower bound, adjacent ones
  int64_t (*padded_centers)(int64_t num_centers, Layout layout);
  int64_t (*scratch_floats)(int64_t width, int64_t num_centers);
  int64_t (*refine_floats)(int64_t width);
  // panels: [padded_centers * D], half_norms: [padded_centers].
  void (*pack)(const float* centers, const float* shift, int64_t num_centers, int64_t width,
               Layout layout, float* panels, float* half_norms);
  void (*assign)(const AssignChunk& chunk);
  int64_t (*refine)(const RefineChunk& chunk);  // returns how many changed
  void (*move)(const MoveChunk& chunk);
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
