// Sums per centre (eq. 10) of tokens sorted by their labels: the second read of the path for any K.
//
//   sums[k] = sum over x of [label(x) = k] w(x) x,   counts[k] = sum over x of [label(x) = k] w(x)
//
// A warp has a run of the sorted rows and a piece of columns a lane, and keeps the sums of one
// centre in registers. Where the label changes they are the partial sums of this run and centre.
#pragma once

#include "kmeans_cuda_sort.cuh"

namespace spt_fast {

// Warps on a multiprocessor at least: a lane has 128 registers, and 128 KiB of rows are under way.
constexpr int kAccumulateWarps = 16;
constexpr int kRowsInFlight = 16;  // that a warp loads before it uses the first one
// n rounded additions to a growing float32 total lose n 2^-24 of the sum of |x| at worst: 8e-6.
// After so many rows totals move to float64; where they correct sums, after kRowsInFlight, as a
// centre may keep but a few of its tokens.
constexpr int kRowsPerMove = 128;

// totals += sums, which are zero then.
template <int kColumns>
__device__ inline void move_sums(double (&totals)[kColumns], float (&sums)[kColumns]) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    totals[c] += sums[c];
    sums[c] = 0.0f;
  }
}

// The partial sums of run r and centre k are row r + k: along the sorted rows either grows, neither
// falls, so that no two pairs share a row. Rows of pairs that do not meet are not written. Piece:
// uint4, or T where rows are not made of whole and aligned uint4. IN tokens [G, M, D]; places,
// sorted, labels of the sort; weights [G, M] or null; OUT partials [G, runs + K, D +
// kExtraColumns], the last column unused. grid = (columns of a warp, runs, groups), one warp.
template <typename T, typename Piece>
__global__ void __launch_bounds__(kWarp, kAccumulateWarps) accumulate_kernel(Problem p, Sort sort) {
  constexpr int kColumns = sizeof(Piece) / sizeof(T);
  __shared__ cub::WarpReduce<double>::TempStorage storage;
  const int lane = threadIdx.x;
  const int64_t group = blockIdx.z;
  const int64_t stride = p.tokens.width + kExtraColumns;
  const int64_t group_begin = center_end(sort, group * p.num_centers - 1);
  const int64_t group_rows = center_end(sort, (group + 1) * p.num_centers - 1) - group_begin;
  const int64_t run_rows = ceil_div(group_rows, p.runs);
  const int64_t begin = blockIdx.y * run_rows;
  const int64_t end = min(begin + run_rows, group_rows);
  const int64_t first_column = (int64_t{blockIdx.x} * kWarp + lane) * kColumns;
  const bool has_columns = first_column < p.tokens.width;
  // A lane without columns loads what the first lane does, and keeps it.
  const T* tokens = group_tokens<T>(p, group) + first_column - (has_columns ? 0 : lane * kColumns);
  const float* weights = p.weights ? p.weights + group * p.rows : nullptr;
  const int64_t* rows = sort.sorted + group_begin;
  const int32_t* labels = sort.labels + group_begin;
  double* partials = p.partials + (group * (p.runs + p.num_centers) + blockIdx.y) * stride;

  float sums[kColumns] = {};
  double totals[kColumns] = {};
  double count = 0.0;
  int64_t center = -1;
  const auto store = [&] {
    move_sums(totals, sums);
    double* partial = partials + center * stride;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (has_columns) partial[first_column + c] = totals[c];
      totals[c] = 0.0;
    }
    count = cub::WarpReduce<double>(storage).Sum(count);
    if (blockIdx.x == 0 && lane == 0) partial[p.tokens.width] = count;
    count = 0.0;
  };

  for (int64_t first = begin; first < end; first += kRowsInFlight) {
    const bool inside = lane < kRowsInFlight && first + lane < end;
    const int64_t row = rows[min(first + lane, end - 1)];
    const int32_t label = inside ? labels[first + lane] : -1;
    const bool is_added = row < p.rows;
    const float weight = weights ? weights[row] : is_added ? 1.0f : -1.0f;
    const int64_t offset = token_offset(p.tokens, is_added ? row : row - p.rows);
    Piece pieces[kRowsInFlight];
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      const T* source = tokens + __shfl_sync(kAllLanes, offset, u);
      pieces[u] = *reinterpret_cast<const Piece*>(source);
    }
    for (unsigned left = __ballot_sync(kAllLanes, inside); left != 0;) {
      const int next = __shfl_sync(kAllLanes, label, __ffs(left) - 1);
      if (next != center && center >= 0) store();
      center = next;
      const unsigned members = __ballot_sync(kAllLanes, label == next);
#pragma unroll
      for (int u = 0; u < kRowsInFlight; ++u) {
        const float its_weight = __shfl_sync(kAllLanes, weight, u);
        keep_packed(pieces[u]);
        alignas(16) T values[kColumns];
        *reinterpret_cast<Piece*>(values) = pieces[u];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (members >> u & 1) sums[c] = fmaf(its_weight, to_float(values[c]), sums[c]);
        }
      }
      if (members >> lane & 1) count += weight;
      left &= ~members;
    }
    if (sort.corrects || (first - begin) % kRowsPerMove == 0) move_sums(totals, sums);
  }
  if (center >= 0) store();
}

}  // namespace spt_fast
