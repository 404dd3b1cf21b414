// Sums per centre (eq. 10) of tokens whose labels are known: the second read of the path for any K.
//
//   sums[k] = sum over x of [label(x) = k] w(x) x,   counts[k] = sum over x of [label(x) = k] w(x)
//
// A thread has four neighbouring columns of a slab of up to kMaxSlab centres: float32 totals in
// shared memory, which move to float64 every kRowsPerMove tokens. No thread reads what another
// writes, so sums need no barrier. A token is read only for the slab that holds its label.
#pragma once

#include "kmeans_cuda_problem.cuh"

namespace spt_fast {

constexpr int kColumnsPerThread = 4;    // one 16-byte load of float32
constexpr int kAccumulateThreads = 64;  // so that 1 KiB of totals is a centre's, and 110 fit
constexpr int kAccumulateColumns = kColumnsPerThread * kAccumulateThreads;
// Rows whose loads are under way at a time: 256 bytes of float32 or of half types a thread.
__host__ __device__ constexpr int rows_in_flight(int element_bytes) { return 64 / element_bytes; }
constexpr int kMaxSlab = 110;  // two blocks of 110 KiB share a multiprocessor of an H100
// n rounded additions to a growing float32 total lose n / 2 2^-24 of the sum of |x| at worst, which
// is 1.2e-4, and about sqrt(n) 2^-24, 4e-6, if roundings are independent. Tests define fewer rows.
#ifndef SPT_ROWS_PER_MOVE
#define SPT_ROWS_PER_MOVE 4096
#endif
constexpr int kRowsPerMove = SPT_ROWS_PER_MOVE;

// Four adjacent elements, as they are in memory.
template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T values[kColumnsPerThread];
};

// Four elements from `source`, those from `count` on as zeros; one load where the alignment allows
// it.
template <typename T>
__device__ inline Quad<T> load_quad(const T* source, int count, bool aligned) {
  if (aligned && count == kColumnsPerThread) return *reinterpret_cast<const Quad<T>*>(source);
  Quad<T> quad;
#pragma unroll
  for (int c = 0; c < kColumnsPerThread; ++c) quad.values[c] = c < count ? source[c] : T{};
  return quad;
}

// Adds the thread's four columns of the totals to the run's partials, in float64, and clears them.
// IN totals [slab], kAccumulateThreads apart; INOUT partial [slab], `stride` apart.
__device__ inline void move_totals(float4* totals, double* partial, int64_t stride, int slab,
                                   int columns, bool first) {
  for (int k = 0; k < slab; ++k) {
    float4& total = totals[k * kAccumulateThreads];
    const float values[kColumnsPerThread] = {total.x, total.y, total.z, total.w};
    double* target = partial + k * stride;
    for (int c = 0; c < columns; ++c) target[c] = first ? values[c] : target[c] + values[c];
    total = {0.0f, 0.0f, 0.0f, 0.0f};
  }
}

// The tokens of a run, rows [begin, end) of the group, and where its partial sums go.
struct Run {
  int64_t group;
  int64_t begin;
  int64_t end;
  double* partial;
};

// The run's sums of four columns, of the centres [first_center, first_center + slab).
template <typename T>
__device__ inline void accumulate_columns(const Problem& p, const Run& run, int64_t first_column,
                                          int64_t first_center, int slab) {
  const int64_t stride = p.tokens.width + kExtraColumns;
  constexpr int kRowsInFlight = rows_in_flight(sizeof(T));
  const int columns = static_cast<int>(
      max(min(p.tokens.width - first_column, int64_t{kColumnsPerThread}), int64_t{0}));
  if (columns == 0) return;
  const T* tokens = group_tokens<T>(p, run.group) + first_column;
  const int32_t* labels = p.labels + run.group * p.rows;
  const float* weights = p.weights ? p.weights + run.group * p.rows : nullptr;
  float4* totals = reinterpret_cast<float4*>(dynamic_shared()) + threadIdx.x;
  for (int k = 0; k < slab; ++k) totals[k * kAccumulateThreads] = {0.0f, 0.0f, 0.0f, 0.0f};

  double* partial = run.partial + first_center * stride + first_column;
  // Row i * inner + j. It is counted up, which spares a division for each row.
  int64_t i = run.begin / p.tokens.inner;
  int64_t j = run.begin - i * p.tokens.inner;
  bool first = true;
  int unmoved = 0;
  for (int64_t first_row = run.begin; first_row < run.end; first_row += kRowsInFlight) {
    int center[kRowsInFlight];
    float weight[kRowsInFlight];
    Quad<T> quads[kRowsInFlight];
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      const int64_t row = first_row + u;
      const int64_t label = row < run.end ? labels[row] - first_center : -1;
      center[u] = label < slab ? static_cast<int>(label) : -1;
      if (center[u] >= 0) {
        weight[u] = weights ? weights[row] : 1.0f;
        const int64_t offset = i * p.tokens.outer_stride + j * p.tokens.inner_stride;
        quads[u] = load_quad(tokens + offset, columns, p.granule == Granule::k16);
      }
      if (++j == p.tokens.inner) {
        j = 0;
        ++i;
      }
    }
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      if (center[u] >= 0) {
        float4& total = totals[center[u] * kAccumulateThreads];
        total.x = fmaf(weight[u], to_float(quads[u].values[0]), total.x);
        total.y = fmaf(weight[u], to_float(quads[u].values[1]), total.y);
        total.z = fmaf(weight[u], to_float(quads[u].values[2]), total.z);
        total.w = fmaf(weight[u], to_float(quads[u].values[3]), total.w);
      }
    }
    unmoved += kRowsInFlight;
    if (unmoved == kRowsPerMove) {
      move_totals(totals, partial, stride, slab, columns, first);
      first = false;
      unmoved = 0;
    }
  }
  if (unmoved || first) move_totals(totals, partial, stride, slab, columns, first);
}

// Counts of all centres and the inertia of a run, in float64; a thread has every 64th centre.
__device__ inline void accumulate_counts(const Problem& p, const Run& run) {
  __shared__ double shares[kAccumulateThreads];
  const int64_t stride = p.tokens.width + kExtraColumns;
  const int64_t first_token = run.group * p.rows;
  for (int64_t k = threadIdx.x; k < p.num_centers; k += kAccumulateThreads) {
    double count = 0.0;
#pragma unroll 8
    for (int64_t row = run.begin; row < run.end; ++row) {
      const float weight = p.weights ? p.weights[first_token + row] : 1.0f;
      if (p.labels[first_token + row] == k) count += weight;
    }
    run.partial[k * stride + p.tokens.width] = count;
  }

  double inertia = 0.0;
  for (int64_t row = run.begin + threadIdx.x; row < run.end; row += kAccumulateThreads) {
    const double weight = p.weights ? p.weights[first_token + row] : 1.0f;
    inertia += weight * p.distances[first_token + row];
  }
  shares[threadIdx.x] = inertia;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0.0;
  for (double share : shares) total += share;
  run.partial[p.tokens.width + 1] = total;
}

// Sums, counts and inertia of each run. IN tokens [G, M, D], labels [G, M], distances [G, M],
// weights [G, M] or null; OUT partials [G, runs, K, D + kExtraColumns]. grid = (column tiles of
// kAccumulateColumns * slabs + 1, runs, groups); the last block in x counts.
template <typename T>
__global__ void __launch_bounds__(kAccumulateThreads) accumulate_kernel(Problem p, int slab) {
  Run run;
  run.group = blockIdx.z;
  const int64_t run_rows = ceil_div(p.rows, p.runs);
  run.begin = min(blockIdx.y * run_rows, p.rows);
  run.end = min(run.begin + run_rows, p.rows);
  run.partial = run_partial(p, run.group, blockIdx.y);
  if (blockIdx.x + 1 == gridDim.x) {
    accumulate_counts(p, run);
    return;
  }
  const int64_t slabs = ceil_div(p.num_centers, slab);
  const int64_t tile = blockIdx.x / slabs;
  const int64_t first_center = (blockIdx.x - tile * slabs) * slab;
  const int64_t first_column = tile * kAccumulateColumns + threadIdx.x * kColumnsPerThread;
  accumulate_columns<T>(p, run, first_column, first_center,
                        static_cast<int>(min(p.num_centers - first_center, int64_t{slab})));
}

}  // namespace spt_fast
