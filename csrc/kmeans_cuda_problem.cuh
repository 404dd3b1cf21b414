// What every k-means kernel is given: the tokens, the centres in the order of the tensor cores, the
// outputs; and what the kernels have in common. Offsets into memory are 64-bit throughout.
//
// Words: a tile is what a warp holds at once (of 16 rows, 16 columns or 8 centres), a slab is the
// centres that are gone through together, a run is the tokens (those of two reads sorted by their
// labels) that have partial sums of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cuda_intrinsics.cuh>

#include "kmeans.h"

namespace spt_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kTileRows = 16;     // rows of a product: the M of mma.m16n8k16
constexpr int kTileColumns = 16;  // columns: its K for half types, two products of m16n8k8 for tf32
constexpr int kTileCenters = 8;   // centres: its N
// Centres are padded to so many tiles at least, which spares the one-read kernel two variants.
constexpr int kMinCenterTiles = 3;
// Besides the D sums, a row of partial sums holds the count and (of centre 0 only) the inertia.
constexpr int kExtraColumns = 2;

struct Problem {
  TokenView tokens;      // [G, M, D]
  bool is_aligned;       // every row begins at a multiple of 16 bytes
  int64_t rows;          // M
  const float* centers;  // [G, K, D]
  const float* shift;    // [G, D]
  const float* weights;  // [G, M], or null
  int64_t num_centers;   // K
  int64_t runs;          // runs of tokens with partial sums of their own
  int column_tiles;      // ceil(D / 16)
  int center_tiles;      // ceil(K / 8), at least kMinCenterTiles
  uint4* packed;         // [G, column_tiles, center_tiles, 32]: see kmeans_cuda_centers.cuh
  float* base;           // [G, 8 center_tiles]: |x - c|^2 = |x - shift|^2 + base + slope * product
  float* slope;          // [G, 8 center_tiles]
  double* partials;      // [G, runs, K, D + kExtraColumns], or as accumulate_kernel leaves them
  int32_t* labels;       // [G, M], or null
  float* distances;      // [G, M], or null
  float* all_distances;  // [G, M, K], or null
};

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Where row `row` of a group begins, in elements. A 64-bit division costs a hundred instructions:
// there is none where rows are evenly spaced, and one of 32 bits where that is enough.
__device__ inline int64_t token_offset(const TokenView& tokens, int64_t row) {
  if (row < tokens.inner) return row * tokens.inner_stride;
  const int64_t i = (row | tokens.inner) >> 32
                        ? row / tokens.inner
                        : static_cast<uint32_t>(row) / static_cast<uint32_t>(tokens.inner);
  return i * tokens.outer_stride + (row - i * tokens.inner) * tokens.inner_stride;
}

template <typename T>
__device__ const T* group_tokens(const Problem& p, int64_t group) {
  return static_cast<const T*>(p.tokens.data) + group * p.tokens.group_stride;
}

__device__ inline double* run_partial(const Problem& p, int64_t group, int64_t run) {
  return p.partials + (group * p.runs + run) * p.num_centers * (p.tokens.width + kExtraColumns);
}

// The array that lies `offset` bytes into the block's shared memory.
template <typename V>
__device__ V* shared_at(int offset) {
  return reinterpret_cast<V*>(dynamic_shared() + offset);
}

// In each of `kLanes` neighbouring lanes, the smallest score of them all and its centre; of equal
// scores the lower centre. A NaN is never smaller.
template <int kLanes>
__device__ inline void share_nearest(float& score, int& center) {
#pragma unroll
  for (int other = kLanes / 2; other > 0; other /= 2) {
    const float its_score = __shfl_xor_sync(kAllLanes, score, other);
    const int its_center = __shfl_xor_sync(kAllLanes, center, other);
    if (its_score < score || (its_score == score && its_center < center)) {
      score = its_score;
      center = its_center;
    }
  }
}

struct Nearest {
  float distance;
  int center;
};

// |x - c|^2 = norm + score, not below zero, where norm = |x - shift|^2 and score is that of the
// nearest centre. A token that is not finite gets centre 0 at an infinite distance, so that the
// inertia shows it.
__device__ inline Nearest finish_distance(float norm, float score, int center) {
  const float distance = norm + score;
  if (!(fabsf(distance) < INFINITY)) return {INFINITY, 0};
  return {fmaxf(distance, 0.0f), center};
}

__device__ inline void store_nearest(const Problem& p, int64_t group, int64_t row,
                                     const Nearest& nearest) {
  if (p.labels) p.labels[group * p.rows + row] = nearest.center;
  if (p.distances) p.distances[group * p.rows + row] = nearest.distance;
}

}  // namespace spt_fast
