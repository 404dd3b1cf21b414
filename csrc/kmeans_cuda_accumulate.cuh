// Sums per centre (eq. 10) of tokens sorted by their labels: the second read of the path for any K.
//
//   sums[k] = sum over x of [label(x) = k] w(x) x,   counts[k] = sum over x of [label(x) = k] w(x)
//
// A warp has a run of the sorted rows and 16 bytes of columns a lane, and keeps the sums of one
// centre in registers. Where the label changes they are the partial sums of this run and centre.
#pragma once

#include "kmeans_cuda_sort.cuh"

namespace spt_fast {

// Warps on a multiprocessor at least: a lane has 128 registers, and 128 KiB of rows are under way.
constexpr int kAccumulateWarps = 16;
// Rows that a warp loads before it uses the first one. Element loads need more registers for one.
template <bool kIsWide>
constexpr int kRowsInFlight = kIsWide ? 16 : 4;
template <typename T>
constexpr int kLaneColumns = 16 / sizeof(T);
// n rounded additions to a growing float32 total lose n 2^-24 of the sum of |x| at worst: 8e-6.
// After so many rows totals move to float64.
constexpr int kRowsPerMove = 128;

// `columns` elements from `source` as they are in memory, zeros after them. kIsWide: always all of
// a lane's, and aligned.
template <typename T, bool kIsWide>
__device__ inline uint4 load_piece(const T* source, int columns) {
  alignas(16) T values[kLaneColumns<T>];
  if (kIsWide) {
    *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(source);
  } else {
#pragma unroll
    for (int c = 0; c < kLaneColumns<T>; ++c) values[c] = c < columns ? source[c] : T{};
  }
  return *reinterpret_cast<const uint4*>(values);
}

// sums += weight * piece.
template <typename T>
__device__ inline void add_piece(float (&sums)[kLaneColumns<T>], float weight, const uint4& piece) {
  alignas(16) T values[kLaneColumns<T>];
  *reinterpret_cast<uint4*>(values) = piece;
#pragma unroll
  for (int c = 0; c < kLaneColumns<T>; ++c) sums[c] = fmaf(weight, to_float(values[c]), sums[c]);
}

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
// falls, so that no two pairs share a row. Rows of pairs that do not meet are not written. IN
// tokens [G, M, D], rows, labels of the sort, weights [G, M] or null; OUT partials [G, runs + K, D
// + kExtraColumns], the last column unused. grid = (pieces of columns, runs, groups), one warp.
template <typename T, bool kIsWide>
__global__ void __launch_bounds__(kWarp, kAccumulateWarps) accumulate_kernel(Problem p, Sort sort) {
  constexpr int kRows = kRowsInFlight<kIsWide>;
  __shared__ cub::WarpReduce<double>::TempStorage storage;
  const int lane = threadIdx.x;
  const int64_t group = blockIdx.z;
  const int64_t stride = p.tokens.width + kExtraColumns;
  const int64_t run_rows = ceil_div(p.rows, p.runs);
  const int64_t begin = blockIdx.y * run_rows;
  const int64_t end = min(begin + run_rows, p.rows);
  const int64_t warp_column = int64_t{blockIdx.x} * kWarp * kLaneColumns<T>;
  const int64_t first_column = warp_column + lane * kLaneColumns<T>;
  const int columns = static_cast<int>(
      max(min(p.tokens.width - first_column, int64_t{kLaneColumns<T>}), int64_t{0}));
  // A lane without columns loads what the first lane does, and keeps it.
  const T* tokens = group_tokens<T>(p, group) + (columns > 0 ? first_column : warp_column);
  const float* weights = p.weights ? p.weights + group * p.rows : nullptr;
  const int32_t* rows = sort.rows + group * p.rows;
  const int32_t* labels = sort.labels + group * p.rows;
  double* partials = p.partials + (group * (p.runs + p.num_centers) + blockIdx.y) * stride;

  float sums[kLaneColumns<T>] = {};
  double totals[kLaneColumns<T>] = {};
  double count = 0.0;
  int64_t center = -1;
  const auto store = [&] {
    move_sums(totals, sums);
    double* partial = partials + center * stride;
#pragma unroll
    for (int c = 0; c < kLaneColumns<T>; ++c) {
      if (c < columns) partial[first_column + c] = totals[c];
      totals[c] = 0.0;
    }
    count = cub::WarpReduce<double>(storage).Sum(count);
    if (blockIdx.x == 0 && lane == 0) partial[p.tokens.width] = count;
    count = 0.0;
  };

  for (int64_t first = begin; first < end; first += kRows) {
    const bool inside = lane < kRows && first + lane < end;
    const int32_t row = rows[min(first + lane, end - 1)];
    const int32_t label = inside ? labels[first + lane] : -1;
    const float weight = weights ? weights[row] : 1.0f;
    const int64_t offset = token_offset(p.tokens, row);
    uint4 pieces[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      pieces[u] = load_piece<T, kIsWide>(tokens + __shfl_sync(kAllLanes, offset, u), columns);
    }
    for (unsigned left = __ballot_sync(kAllLanes, inside); left != 0;) {
      const int next = __shfl_sync(kAllLanes, label, __ffs(left) - 1);
      if (next != center && center >= 0) store();
      center = next;
      const unsigned members = __ballot_sync(kAllLanes, label == next);
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const float its_weight = __shfl_sync(kAllLanes, weight, u);
        keep_packed(pieces[u]);
        if (members >> u & 1) add_piece<T>(sums, its_weight, pieces[u]);
      }
      if (members >> lane & 1) count += weight;
      left &= ~members;
    }
    if ((first - begin) % kRowsPerMove == 0) move_sums(totals, sums);
  }
  if (center >= 0) store();
}

}  // namespace spt_fast
