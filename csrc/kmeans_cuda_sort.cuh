// Sorts the tokens of every group by their labels, rows of one label ascending: a counting sort.
//
//   place(row) = tokens of smaller labels + tokens of the same label in rows before it
//
// A warp has a share of consecutive rows. It counts its labels; counts become places; it goes
// through its rows again and puts each in its place. CUB's radix sort takes more launches, keys
// that hold the group, and a search for where each centre begins. Limit: 2^31 - 1 rows a group.
#pragma once

#include <cub/block/block_scan.cuh>
#include <cub/warp/warp_reduce.cuh>
#include <cub/warp/warp_scan.cuh>

#include "kmeans_cuda_problem.cuh"

namespace spt_fast {

constexpr int kLabelsAhead = 8;  // loads of a lane that are under way at a time
// Shares of a group at most: eight warps for a multiprocessor, nearly. Tests define fewer.
#ifndef SPT_MAX_SHARES
#define SPT_MAX_SHARES 1023
#endif
constexpr int kScanThreads = SPT_MAX_SHARES + 1;

struct Sort {
  int64_t shares;    // of the rows of a group
  int64_t stride;    // shares + 1
  int32_t* counts;   // [G, K, stride]: tokens; then those of the same label in earlier shares
  double* inertia;   // [G, shares]
  int32_t* offsets;  // [G, K + 1]: tokens of smaller labels
  int32_t* rows;     // [G, M], sorted
  int32_t* labels;   // [G, M], of these rows
};

// Where this block's share has its numbers in counts, sort.stride apart.
__device__ inline int32_t* share_counts(const Problem& p, const Sort& sort) {
  return sort.counts + blockIdx.y * p.num_centers * sort.stride + blockIdx.x;
}

// Calls visit(row, label, count) for the rows of the share, one a lane, and counts the labels up,
// as if row followed row. INOUT counts [K], sort.stride apart.
template <typename Visitor>
__device__ inline void visit_share(const Problem& p, const Sort& sort, int32_t* counts,
                                   const Visitor& visit) {
  const unsigned lane = threadIdx.x;
  const int64_t share_rows = ceil_div(p.rows, sort.shares);
  const int64_t end = min((blockIdx.x + 1) * share_rows, p.rows);
  const int32_t* labels = p.labels + blockIdx.y * p.rows;
  for (int64_t first = blockIdx.x * share_rows; first < end; first += kLabelsAhead * kWarp) {
    int32_t ahead[kLabelsAhead];
#pragma unroll
    for (int i = 0; i < kLabelsAhead; ++i) {
      const int64_t row = first + i * kWarp + lane;
      ahead[i] = row < end ? labels[row] : -1;
    }
#pragma unroll
    for (int i = 0; i < kLabelsAhead; ++i) {
      const int64_t label = ahead[i];
      const unsigned equals = __match_any_sync(kAllLanes, ahead[i]);
      const int before = __popc(equals & ((1u << lane) - 1));
      const int32_t count = label < 0 ? 0 : counts[label * sort.stride] + before;
      __syncwarp();
      if (label >= 0 && before == 0) counts[label * sort.stride] = count + __popc(equals);
      __syncwarp();
      if (label >= 0) visit(first + i * kWarp + lane, ahead[i], count);
    }
  }
}

// Tokens of each centre, and the inertia, of a share. IN labels, distances, weights [G, M] or null;
// OUT counts, inertia of the sort. grid = (shares, groups), one warp.
__global__ void __launch_bounds__(kWarp) count_labels_kernel(Problem p, Sort sort) {
  __shared__ cub::WarpReduce<double>::TempStorage storage;
  int32_t* counts = share_counts(p, sort);
  for (int64_t k = threadIdx.x; k < p.num_centers; k += kWarp) counts[k * sort.stride] = 0;
  __syncwarp();

  const int64_t first = blockIdx.y * p.rows;
  double inertia = 0.0;
  visit_share(p, sort, counts, [&](int64_t row, int32_t, int32_t) {
    const double weight = p.weights ? p.weights[first + row] : 1.0f;
    inertia += weight * p.distances[first + row];
  });
  inertia = cub::WarpReduce<double>(storage).Sum(inertia);
  if (threadIdx.x == 0) sort.inertia[blockIdx.y * sort.shares + blockIdx.x] = inertia;
}

// counts[g, k, s] becomes the sum of those of shares before s. INOUT counts. grid = (G K).
__global__ void __launch_bounds__(kScanThreads) scan_counts_kernel(Sort sort) {
  __shared__ typename cub::BlockScan<int32_t, kScanThreads>::TempStorage storage;
  int32_t& count = sort.counts[blockIdx.x * sort.stride + threadIdx.x];
  int32_t before = 0;
  const int32_t own = threadIdx.x < sort.shares ? count : 0;
  cub::BlockScan<int32_t, kScanThreads>(storage).ExclusiveSum(own, before);
  if (threadIdx.x < sort.stride) count = before;
}

// Puts every row and its label in its place. IN labels [G, M]; INOUT counts; OUT rows, labels,
// offsets of the sort. grid = (shares, groups), one warp.
__global__ void __launch_bounds__(kWarp) sort_rows_kernel(Problem p, Sort sort) {
  __shared__ cub::WarpScan<int32_t>::TempStorage storage;
  int32_t* offsets = sort.offsets + blockIdx.y * (p.num_centers + 1);
  int32_t* counts = share_counts(p, sort);
  const int32_t* totals = counts - blockIdx.x + sort.shares;
  int32_t smaller = 0;
  for (int64_t k = threadIdx.x; k - threadIdx.x < p.num_centers; k += kWarp) {
    const bool is_center = k < p.num_centers;
    int32_t before = 0;
    int32_t sum = 0;
    cub::WarpScan<int32_t>(storage).ExclusiveSum(is_center ? totals[k * sort.stride] : 0, before,
                                                 sum);
    if (is_center) counts[k * sort.stride] += smaller + before;
    if (is_center && blockIdx.x == 0) offsets[k] = smaller + before;
    smaller += sum;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) offsets[p.num_centers] = smaller;
  __syncwarp();

  const int64_t first = blockIdx.y * p.rows;
  visit_share(p, sort, counts, [&](int64_t row, int32_t label, int32_t place) {
    sort.rows[first + place] = static_cast<int32_t>(row);
    sort.labels[first + place] = label;
  });
}

}  // namespace spt_fast
