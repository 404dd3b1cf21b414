// Adds up the partial sums of the runs, in a fixed order.
#pragma once

#include "kmeans_cuda_problem.cuh"

namespace spt_fast {

// Eight loads of a warp are under way at a time; with eight warps they hide the memory's latency.
constexpr int kReduceWarps = 8;
constexpr int kReduceThreads = kReduceWarps * kWarp;

// sums[g, k, d] = sum over runs r of partials[g, r, k, d]; counts and inertia likewise, from the
// extra columns. IN partials [G, runs, K, D + kExtraColumns]; OUT sums [G, K, D], counts [G, K],
// inertia [G]. A block has 32 neighbouring elements, one a lane; warp w adds up runs w, w + 8, ...

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
