// Adds the partial sums of the runs up, in a fixed order, and hands them out as the results.
//
// 32 neighbouring elements to a block; eight warps take every eighth run, and meet at the end.
#pragma once

#include "kmeans_cuda_problem.cuh"

namespace spt_fast {

constexpr int kReduceWarps = 8;
constexpr int kReduceThreads = kReduceWarps * kWarp;

__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(Problem p, double* sums, double* counts, double* inertia) {
  __shared__ double shares[kReduceWarps][kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t width = p.tokens.width;
  const int64_t columns = width + kExtraColumns;
  const int64_t group_size = p.num_centers * columns;
  const int64_t index = int64_t{blockIdx.x} * kWarp + lane;
  const bool inside = index < p.tokens.groups * group_size;
  const int64_t group = inside ? index / group_size : 0;
  const int64_t element = inside ? index - group * group_size : 0;
  const int64_t center = element / columns;
  const int64_t column = element - center * columns;
  // Only centre 0 has an inertia, that of its whole group.
  const bool is_result = inside && (column <= width || center == 0);

  double total = 0.0;
  if (is_result) {
#pragma unroll 8
    for (int64_t run = warp; run < p.runs; run += kReduceWarps) {
      total += run_partial(p, group, run)[element];
    }
  }
  shares[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || !is_result) return;
  for (int w = 1; w < kReduceWarps; ++w) total += shares[w][lane];
  if (column < width) {
    sums[(group * p.num_centers + center) * width + column] = total;
  } else if (column == width) {
    counts[group * p.num_centers + center] = total;
  } else {
    inertia[group] = total;
  }
}

}  // namespace spt_fast
