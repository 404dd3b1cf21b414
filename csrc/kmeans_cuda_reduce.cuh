// Adds up the partial sums of the runs, in a fixed order.
#pragma once

#include "kmeans_cuda_sort.cuh"

namespace spt_fast {

// Eight loads of a warp are under way at a time; with eight warps they hide the memory's latency.
constexpr int kReduceWarps = 8;
constexpr int kReduceThreads = kReduceWarps * kWarp;

// The numbers that add up to one result.
struct PartialSums {
  const double* first;
  int64_t stride;
  int64_t number;
};

// After the one-read kernel, which leaves no sort, all runs have all centres. After
// accumulate_kernel, run r and centre k, where they meet, are row r + k.
__device__ inline PartialSums find_partial_sums(const Problem& p, const Sort& sort, int64_t group,
                                                int64_t center, int64_t column) {
  const int64_t columns = p.tokens.width + kExtraColumns;
  const double* first = run_partial(p, group, 0) + center * columns + column;
  if (!sort.places) return {first, p.num_centers * columns, p.runs};
  if (column > p.tokens.width) return {sort.inertia + group * sort.shares, 1, sort.shares};
  const int64_t first_center = group * p.num_centers;
  const int64_t group_begin = center_end(sort, first_center - 1);
  const int64_t begin = center_end(sort, first_center + center - 1) - group_begin;
  const int64_t end = center_end(sort, first_center + center) - group_begin;
  if (begin == end) return {};
  const int64_t group_end = center_end(sort, first_center + p.num_centers - 1);
  const int64_t run_rows = ceil_div(group_end - group_begin, p.runs);
  const int64_t row = group * (p.runs + p.num_centers) + begin / run_rows + center;
  const int64_t number = (end - 1) / run_rows - begin / run_rows + 1;
  return {p.partials + row * columns + column, columns, number};
}

// sums[g, k, d] = sum over runs of their partial sums; counts and inertia likewise. IN partials,
// places and inertia of the sort; OUT sums [G, K, D], counts [G, K], inertia [G]; where the sort
// corrects them, INOUT sums and counts. A block has 32
// neighbouring elements, one a lane; warp w adds up partial sums w, w + 8, ...
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(Problem p, Sort sort, double* sums, double* counts, double* inertia) {
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

  const PartialSums partial =
      is_result ? find_partial_sums(p, sort, group, center, column) : PartialSums{};
  double total = 0.0;
#pragma unroll 8
  for (int64_t i = warp; i < partial.number; i += kReduceWarps) {
    total += partial.first[i * partial.stride];
  }
  shares[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || !is_result) return;
  for (int w = 1; w < kReduceWarps; ++w) total += shares[w][lane];
  const int64_t index_of_center = group * p.num_centers + center;
  double* result = column < width    ? sums + index_of_center * width + column
                   : column == width ? counts + index_of_center
                                     : inertia + group;
  *result = sort.corrects && column <= width ? *result + total : total;
}

}  // namespace spt_fast
