// Sorts the tokens of every group by their labels, rows of one label ascending: a counting sort.
//
//   place(row) = tokens of smaller labels + tokens of the same label in rows before it
//
// A warp has a share of consecutive rows. It counts its labels; CUB's scan turns the counts of all
// shares into places; the warp goes through its rows again and puts each in its place. CUB's radix
// sort takes more launches, keys that hold the group, and a search for where each centre begins.
#pragma once

#include <cub/device/device_scan.cuh>
#include <cub/warp/warp_reduce.cuh>

#include "kmeans_cuda_problem.cuh"

namespace spt_fast {

constexpr int kLabelsAhead = 8;  // loads of a lane that are under way at a time

struct Sort {
  int64_t shares;   // of the rows of a group
  int64_t* places;  // [G, K, shares]: tokens; then the place of the first; then that after the last
  double* inertia;  // [G, shares]
  int64_t* rows;    // [G, M], sorted
  int32_t* labels;  // [G, M], of these rows
  void* storage;    // of the scan
  size_t storage_bytes;
};

// Where this block's share has its numbers in places, sort.shares apart.
__device__ inline int64_t* share_places(const Problem& p, const Sort& sort) {
  return sort.places + blockIdx.y * p.num_centers * sort.shares + blockIdx.x;
}

// Calls visit(row, label, places[label]++) for the rows of the share, 32 at a time, as if row
// followed row. INOUT places [K], sort.shares apart.
template <typename Visitor>
__device__ inline void visit_share(const Problem& p, const Sort& sort, int64_t* places,
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
      int64_t* next = places + label * sort.shares;
      const int64_t place = label < 0 ? 0 : *next + before;
      __syncwarp();
      if (label >= 0 && before == 0) *next = place + __popc(equals);
      __syncwarp();
      if (label >= 0) visit(first + i * kWarp + lane, ahead[i], place);
    }
  }
}

// Tokens of each centre, and the inertia, of a share. IN labels, distances, weights [G, M] or null;
// OUT places, inertia of the sort. grid = (shares, groups), one warp.
__global__ void __launch_bounds__(kWarp) count_labels_kernel(Problem p, Sort sort) {
  __shared__ cub::WarpReduce<double>::TempStorage storage;
  int64_t* counts = share_places(p, sort);
  for (int64_t k = threadIdx.x; k < p.num_centers; k += kWarp) counts[k * sort.shares] = 0;
  __syncwarp();
  const int64_t first = blockIdx.y * p.rows;
  double inertia = 0.0;
  visit_share(p, sort, counts, [&](int64_t row, int32_t, int64_t) {
    const double weight = p.weights ? p.weights[first + row] : 1.0f;
    inertia += weight * p.distances[first + row];
  });
  inertia = cub::WarpReduce<double>(storage).Sum(inertia);
  if (threadIdx.x == 0) sort.inertia[blockIdx.y * sort.shares + blockIdx.x] = inertia;
}

// Puts every row and its label in its place. IN labels [G, M]; INOUT places; OUT rows, labels of
// the sort. grid = (shares, groups), one warp.
__global__ void __launch_bounds__(kWarp) sort_rows_kernel(Problem p, Sort sort) {
  visit_share(p, sort, share_places(p, sort), [&](int64_t row, int32_t label, int64_t place) {
    sort.rows[place] = row;
    sort.labels[place] = label;
  });
}

}  // namespace spt_fast
