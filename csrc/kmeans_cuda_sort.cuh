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

// A pass that corrects the sums of the last one has two rows for each token: row m adds token m to
// its centre, and row M + m takes it away from the one that it had. Where these are the same centre
// both have the label -1, and are left out.
struct Sort {
  bool corrects;
  int64_t rows;       // of a group: M or 2 M
  int64_t shares;     // of these rows
  int32_t* unsorted;  // [G, rows]: their labels
  int64_t* places;    // [G, K, shares]: rows; then the place of the first; then that after the last
  double* inertia;    // [G, shares]
  int64_t* sorted;    // of all groups, one after the other: rows
  int32_t* labels;    // of these rows
  void* storage;      // of the scan
  size_t storage_bytes;
};

// The place after the last row of centre `index` of all G K, once the rows are sorted.
__device__ inline int64_t center_end(const Sort& sort, int64_t index) {
  return index < 0 ? 0 : sort.places[(index + 1) * sort.shares - 1];
}

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
  const int64_t share_rows = ceil_div(sort.rows, sort.shares);
  const int64_t end = min((blockIdx.x + 1) * share_rows, sort.rows);
  const int32_t* labels = sort.unsorted + blockIdx.y * sort.rows;
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

// The inertia of a share of the tokens, and what they change. IN labels, distances, weights [G, M]
// or null; INOUT last [G, M]: the labels of the last pass, or null; OUT inertia and, with `last`,
// unsorted of the sort. grid = (shares, groups), one warp.
__global__ void __launch_bounds__(kWarp)
    compare_labels_kernel(Problem p, Sort sort, int32_t* last) {
  __shared__ cub::WarpReduce<double>::TempStorage storage;
  const int64_t share_rows = ceil_div(p.rows, sort.shares);
  const int64_t end = min((blockIdx.x + 1) * share_rows, p.rows);
  double inertia = 0.0;
#pragma unroll 8
  for (int64_t row = blockIdx.x * share_rows + threadIdx.x; row < end; row += kWarp) {
    const int64_t token = blockIdx.y * p.rows + row;
    const double weight = p.weights ? p.weights[token] : 1.0f;
    inertia += weight * p.distances[token];
    if (last) {
      const int32_t label = p.labels[token];
      const int32_t before = last[token];
      int32_t* change = sort.unsorted + blockIdx.y * sort.rows + row;
      change[0] = label == before ? -1 : label;
      change[p.rows] = label == before ? -1 : before;
      last[token] = label;
    }
  }
  inertia = cub::WarpReduce<double>(storage).Sum(inertia);
  if (threadIdx.x == 0) sort.inertia[blockIdx.y * sort.shares + blockIdx.x] = inertia;
}

// Rows of each centre in a share. IN unsorted; OUT places. grid = (shares, groups), one warp.
__global__ void __launch_bounds__(kWarp) count_labels_kernel(Problem p, Sort sort) {
  int64_t* counts = share_places(p, sort);
  for (int64_t k = threadIdx.x; k < p.num_centers; k += kWarp) counts[k * sort.shares] = 0;
  __syncwarp();
  visit_share(p, sort, counts, [](int64_t, int32_t, int64_t) {});
}

// Puts every row and its label in its place. IN unsorted; INOUT places; OUT sorted, labels. grid =
// (shares, groups), one warp.
__global__ void __launch_bounds__(kWarp) sort_rows_kernel(Problem p, Sort sort) {
  visit_share(p, sort, share_places(p, sort), [&](int64_t row, int32_t label, int64_t place) {
    sort.sorted[place] = row;
    sort.labels[place] = label;
  });
}

}  // namespace spt_fast
