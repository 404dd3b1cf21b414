// Sums per centre of tokens whose labels are known: the second read of the path for any K.
//
// A thread owns four neighbouring columns of up to kMaxSlab centres, float32 totals in shared
// memory that move to float64 every kRowsPerMove tokens. Threads share nothing, so there is nothing
// to synchronise. A token is read only for the slab of centres that holds its label.
#pragma once

#include "kmeans_cuda_problem.cuh"

namespace spt_fast {

constexpr int kColumnsPerThread = 4;
constexpr int kAccumulateThreads = 64;
constexpr int kAccumulateColumns = kColumnsPerThread * kAccumulateThreads;
// Loads that are under way at a time: 128 bytes a thread keep the memory busy.
__host__ __device__ constexpr int rows_in_flight(int element_bytes) { return 64 / element_bytes; }
constexpr int kMaxSlab = 110;
constexpr int kRowsPerMove = 4096;

// Four adjacent elements, as they are in memory.
template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T values[kColumnsPerThread];
};

// In one load where the alignment allows it; those from `count` on are zero.
template <typename T>
__device__ inline Quad<T> load_quad(const T* source, int count, bool aligned) {
  if (aligned && count == kColumnsPerThread) return *reinterpret_cast<const Quad<T>*>(source);
  Quad<T> quad;
#pragma unroll
  for (int c = 0; c < kColumnsPerThread; ++c) quad.values[c] = c < count ? source[c] : T{};
  return quad;
}

// The thread's four columns of a run's totals, to be added to its float64 partials, and cleared.
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

// Sums of four columns of the centres [first_center, first_center + slab).
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
  // The position is counted up, which spares a division for each row.
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

// Counts of all centres and the inertia of a run, in float64; a thread owns every 64th centre.
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

// grid = (tiles of columns x slabs of centres + 1, runs, groups); the extra block counts.
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
