// Assign-and-accumulate on the GPU: a first, simple version of the contract in kmeans.h.
//
// Three launches: labels and distances of every token; per-centre partial sums of fixed runs of
// tokens; their totals. No atomics and a fixed order of every sum, so results repeat to the bit.
// A token that is not finite goes to centre 0 at an infinite distance, so that the inertia shows
// it. Limits: at most 65535 groups; CUDA cores only, and tokens are read twice.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kmeans.h"

namespace spt_fast {
namespace {

// assign_kernel: a block holds kTileRows tokens and goes through the centres kTileCenters at a
// time, each thread keeping a kMicro x kMicro patch of squared distances in registers.
constexpr int kTileRows = 64;
constexpr int kTileCenters = 64;
constexpr int kTileWidth = 32;
constexpr int kMicro = 4;
constexpr int kCenterLanes = kTileCenters / kMicro;
constexpr int kAssignThreads = kCenterLanes * (kTileRows / kMicro);
// Rows of the shared tiles are padded against bank conflicts, and stay aligned for float4.
constexpr int kTileStride = kTileRows + 4;
static_assert(kTileRows == kTileCenters, "both tiles are loaded by the same loop");
static_assert(kAssignThreads % kTileWidth == 0 && kCenterLanes <= 32,
              "lanes of a row share a warp");

// accumulate_kernel: a thread owns one column of kSlabCenters float64 totals in shared memory.
constexpr int kColumns = 64;
constexpr int kSlabCenters = 64;
constexpr int kRowsInFlight = 8;
// Besides the D sums, a partial row holds the count and (in centre 0 only) the inertia.
constexpr int kExtraColumns = 2;

constexpr int kReduceThreads = 256;
constexpr int64_t kMaxGridYZ = 65535;

// Runs of tokens with partial sums of their own: enough to fill a GPU, bounded in memory.
constexpr int64_t kMaxRuns = 64;
constexpr int64_t kMinRows = 256;
constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;

struct Problem {
  TokenView tokens;
  int64_t rows;
  const float* centers;
  const float* weights;
  int64_t num_centers;
  int64_t runs;
  int32_t* labels;
  float* distances;
  double* partials;  // [G, runs, K, D + kExtraColumns]
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ int64_t token_offset(const TokenView& tokens, int64_t group, int64_t row) {
  const int64_t i = row / tokens.inner;
  const int64_t j = row - i * tokens.inner;
  return group * tokens.group_stride + i * tokens.outer_stride + j * tokens.inner_stride;
}

// label_m = argmin_k sum_d (x_md - c_kd)^2, the lowest k on a tie. The differences are taken
// directly, which costs one more instruction than |x|^2 - 2 x.c + |c|^2 and cannot cancel; the
// shift of AssignArgs is not needed. grid = (tiles of rows, groups).
template <typename T>
__global__ void __launch_bounds__(kAssignThreads) assign_kernel(Problem p) {
  alignas(16) __shared__ float token_tile[kTileWidth][kTileStride];
  alignas(16) __shared__ float center_tile[kTileWidth][kTileStride];
  __shared__ int64_t offsets[kTileRows];

  const int64_t group = blockIdx.y;
  const int64_t first_row = int64_t{blockIdx.x} * kTileRows;
  const int64_t rows = p.rows;
  const int64_t width = p.tokens.width;
  const T* tokens = static_cast<const T*>(p.tokens.data);
  const float* centers = p.centers + group * p.num_centers * width;
  const int row_lane = threadIdx.x / kCenterLanes;
  const int center_lane = threadIdx.x % kCenterLanes;
  const int load_column = threadIdx.x % kTileWidth;
  const int load_row = threadIdx.x / kTileWidth;

  if (threadIdx.x < kTileRows) {
    const int64_t row = min(first_row + threadIdx.x, rows - 1);
    offsets[threadIdx.x] = token_offset(p.tokens, group, row);
  }

  float best_distance[kMicro];
  int32_t best_label[kMicro];
  for (int r = 0; r < kMicro; ++r) {
    best_distance[r] = INFINITY;
    best_label[r] = 0;
  }

  for (int64_t first_center = 0; first_center < p.num_centers; first_center += kTileCenters) {
    float patch[kMicro][kMicro] = {};
    for (int64_t first_column = 0; first_column < width; first_column += kTileWidth) {
      __syncthreads();
      const int64_t column = first_column + load_column;
      for (int i = load_row; i < kTileRows; i += kAssignThreads / kTileWidth) {
        const int64_t center = first_center + i;
        const bool inside = column < width;
        token_tile[load_column][i] = inside ? to_float(tokens[offsets[i] + column]) : 0.0f;
        center_tile[load_column][i] =
            inside && center < p.num_centers ? centers[center * width + column] : 0.0f;
      }
      __syncthreads();
#pragma unroll 8
      for (int d = 0; d < kTileWidth; ++d) {
        const float4 x4 = *reinterpret_cast<const float4*>(&token_tile[d][row_lane * kMicro]);
        const float4 c4 = *reinterpret_cast<const float4*>(&center_tile[d][center_lane * kMicro]);
        const float x[kMicro] = {x4.x, x4.y, x4.z, x4.w};
        const float c[kMicro] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
        for (int r = 0; r < kMicro; ++r) {
#pragma unroll
          for (int k = 0; k < kMicro; ++k) {
            const float difference = x[r] - c[k];
            patch[r][k] += difference * difference;
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kMicro; ++r) {
#pragma unroll
      for (int k = 0; k < kMicro; ++k) {
        const int64_t center = first_center + center_lane * kMicro + k;
        // A thread sees its centres in rising order, so `<` keeps the lowest of equals.
        if (center < p.num_centers && patch[r][k] < best_distance[r]) {
          best_distance[r] = patch[r][k];
          best_label[r] = static_cast<int32_t>(center);
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kMicro; ++r) {
#pragma unroll
    for (int lane = kCenterLanes / 2; lane > 0; lane /= 2) {
      const float distance = __shfl_xor_sync(0xffffffffu, best_distance[r], lane);
      const int32_t label = __shfl_xor_sync(0xffffffffu, best_label[r], lane);
      if (distance < best_distance[r] || (distance == best_distance[r] && label < best_label[r])) {
        best_distance[r] = distance;
        best_label[r] = label;
      }
    }
    const int64_t row = first_row + row_lane * kMicro + r;
    if (center_lane == 0 && row < rows) {
      p.labels[group * rows + row] = best_label[r];
      p.distances[group * rows + row] = best_distance[r];
    }
  }
}

// partial_kd = sum over a run's tokens of w_m [label_m = k] x_md, with x_mD = 1 (the count) and
// column D + 1 the inertia. Threads share nothing, so there is nothing to synchronise; a token is
// read only for the slab of centres that holds its label.
// grid = (tiles of columns, runs, groups).
template <typename T>
__global__ void __launch_bounds__(kColumns) accumulate_kernel(Problem p) {
  __shared__ double totals[kSlabCenters][kColumns];

  const int64_t group = blockIdx.z;
  const int64_t run = blockIdx.y;
  const int64_t width = p.tokens.width;
  const int64_t column = int64_t{blockIdx.x} * kColumns + threadIdx.x;
  if (column >= width + kExtraColumns) return;
  const bool is_token = column < width;
  const bool is_inertia = column == width + 1;

  const int64_t rows = p.rows;
  const int64_t run_rows = (rows + p.runs - 1) / p.runs;
  const int64_t begin = min(run * run_rows, rows);
  const int64_t end = min(begin + run_rows, rows);
  const T* tokens = static_cast<const T*>(p.tokens.data);
  const int32_t* labels = p.labels + group * rows;
  const float* distances = p.distances + group * rows;
  const float* weights = p.weights ? p.weights + group * rows : nullptr;
  double* partial = p.partials + (group * p.runs + run) * p.num_centers * (width + kExtraColumns);

  for (int64_t first_center = 0; first_center < p.num_centers; first_center += kSlabCenters) {
    const int slab = static_cast<int>(min(p.num_centers - first_center, int64_t{kSlabCenters}));
    for (int k = 0; k < slab; ++k) totals[k][threadIdx.x] = 0.0;

    int64_t i = begin / p.tokens.inner;
    int64_t j = begin - i * p.tokens.inner;
    for (int64_t first_row = begin; first_row < end; first_row += kRowsInFlight) {
      int center[kRowsInFlight];
      float weight[kRowsInFlight];
      float value[kRowsInFlight];
#pragma unroll
      for (int u = 0; u < kRowsInFlight; ++u) {
        const int64_t row = first_row + u;
        center[u] = -1;
        if (row < end) {
          const int64_t k = (is_inertia ? 0 : labels[row]) - first_center;
          if (k >= 0 && k < slab) {
            const int64_t offset = group * p.tokens.group_stride + i * p.tokens.outer_stride +
                                   j * p.tokens.inner_stride;
            center[u] = static_cast<int>(k);
            weight[u] = weights ? weights[row] : 1.0f;
            value[u] = is_token     ? to_float(tokens[offset + column])
                       : is_inertia ? distances[row]
                                    : 1.0f;
          }
        }
        if (++j == p.tokens.inner) {
          j = 0;
          ++i;
        }
      }
#pragma unroll
      for (int u = 0; u < kRowsInFlight; ++u) {
        if (center[u] >= 0) {
          totals[center[u]][threadIdx.x] += static_cast<double>(weight[u]) * value[u];
        }
      }
    }
    for (int k = 0; k < slab; ++k) {
      partial[(first_center + k) * (width + kExtraColumns) + column] = totals[k][threadIdx.x];
    }
  }
}

// Adds up the runs, first to last. One thread per element of [G, K, D + kExtraColumns].
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(Problem p, double* sums, double* counts, double* inertia) {
  const int64_t width = p.tokens.width;
  const int64_t columns = width + kExtraColumns;
  const int64_t group_size = p.num_centers * columns;
  const int64_t index = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  if (index >= p.tokens.groups * group_size) return;
  const int64_t group = index / group_size;
  const int64_t element = index - group * group_size;
  const int64_t center = element / columns;
  const int64_t column = element - center * columns;

  double total = 0.0;
  for (int64_t run = 0; run < p.runs; ++run) {
    total += p.partials[(group * p.runs + run) * group_size + element];
  }
  if (column < width) {
    sums[(group * p.num_centers + center) * width + column] = total;
  } else if (column == width) {
    counts[group * p.num_centers + center] = total;
  } else if (center == 0) {
    inertia[group] = total;
  }
}

void check(cudaError_t status, const char* what, int line) {
  if (status == cudaSuccess) return;
  // Forget the error, which the next call would otherwise take for its own.
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status) + " (" +
                           __FILE__ + ":" + std::to_string(line) + ")");
}
#define SPT_CUDA_CHECK(call) check((call), #call, __LINE__)

// Makes `device` current, and the caller's device again on the way out.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    SPT_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device != previous_) SPT_CUDA_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// Depends on the sizes only, never on the GPU: the same input gives the same bits everywhere.
int64_t num_runs(int64_t groups, int64_t rows, int64_t width, int64_t num_centers) {
  const int64_t run_bytes =
      groups * num_centers * (width + kExtraColumns) * int64_t{sizeof(double)};
  const int64_t most = std::min(ceil_div(kMaxRuns, groups), kMaxPartialBytes / run_bytes);
  return std::max<int64_t>(1, std::min(most, rows / kMinRows));
}

void validate(const AssignArgs& args, const void* workspace) {
  const TokenView& tokens = args.tokens;
  if (tokens.groups > kMaxGridYZ) {
    throw std::invalid_argument("groups must be at most 65535 on CUDA, got " +
                                std::to_string(tokens.groups));
  }
  if (tokens.width < 1 || args.num_centers < 1 || args.num_centers > INT32_MAX) {
    throw std::invalid_argument("width and num_centers must be positive, got " +
                                std::to_string(tokens.width) + " and " +
                                std::to_string(args.num_centers));
  }
  if (!tokens.data || !args.centers || !args.sums || !args.counts || !args.inertia || !workspace) {
    throw std::invalid_argument("tokens, centers, sums, counts, inertia and workspace must be set");
  }
}

template <typename T>
void launch_assign_accumulate(const Problem& p, const AssignArgs& args, cudaStream_t stream) {
  const TokenView& tokens = p.tokens;
  const int64_t columns = tokens.width + kExtraColumns;
  const dim3 assign_grid(static_cast<unsigned>(ceil_div(p.rows, kTileRows)),
                         static_cast<unsigned>(tokens.groups));
  assign_kernel<T><<<assign_grid, kAssignThreads, 0, stream>>>(p);
  SPT_CUDA_CHECK(cudaGetLastError());
  const dim3 accumulate_grid(static_cast<unsigned>(ceil_div(columns, kColumns)),
                             static_cast<unsigned>(p.runs), static_cast<unsigned>(tokens.groups));
  accumulate_kernel<T><<<accumulate_grid, kColumns, 0, stream>>>(p);
  SPT_CUDA_CHECK(cudaGetLastError());
  const int64_t elements = tokens.groups * p.num_centers * columns;
  const auto reduce_blocks = static_cast<unsigned>(ceil_div(elements, kReduceThreads));
  reduce_kernel<<<reduce_blocks, kReduceThreads, 0, stream>>>(p, args.sums, args.counts,
                                                              args.inertia);
  SPT_CUDA_CHECK(cudaGetLastError());
}

void clear_outputs(const AssignArgs& args, cudaStream_t stream) {
  const int64_t centers = args.tokens.groups * args.num_centers;
  SPT_CUDA_CHECK(
      cudaMemsetAsync(args.sums, 0, centers * args.tokens.width * sizeof(double), stream));
  SPT_CUDA_CHECK(cudaMemsetAsync(args.counts, 0, centers * sizeof(double), stream));
  SPT_CUDA_CHECK(cudaMemsetAsync(args.inertia, 0, args.tokens.groups * sizeof(double), stream));
}

}  // namespace

int64_t assign_accumulate_cuda_workspace(int64_t groups, int64_t rows, int64_t width,
                                         int64_t num_centers) {
  if (groups < 1 || rows < 1) return 256;
  const int64_t partials = groups * num_runs(groups, rows, width, num_centers) * num_centers *
                           (width + kExtraColumns) * int64_t{sizeof(double)};
  return align(partials) + align(groups * rows * int64_t{sizeof(float)}) +
         align(groups * rows * int64_t{sizeof(int32_t)});
}

void assign_accumulate_cuda(const AssignArgs& args, void* workspace, int device, void* stream) {
  const TokenView& tokens = args.tokens;
  if (tokens.groups < 1) return;
  const DeviceGuard guard(device);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (tokens.rows() < 1) {
    clear_outputs(args, cuda_stream);
    return;
  }
  validate(args, workspace);

  Problem p{};
  p.tokens = tokens;
  p.rows = tokens.rows();
  p.centers = args.centers;
  p.weights = args.weights;
  p.num_centers = args.num_centers;
  p.runs = num_runs(tokens.groups, tokens.rows(), tokens.width, args.num_centers);
  char* next = static_cast<char*>(workspace);
  p.partials = reinterpret_cast<double*>(next);
  next += align(tokens.groups * p.runs * p.num_centers * (tokens.width + kExtraColumns) *
                int64_t{sizeof(double)});
  p.distances = args.distances ? args.distances : reinterpret_cast<float*>(next);
  next += align(tokens.groups * tokens.rows() * int64_t{sizeof(float)});
  p.labels = args.labels ? args.labels : reinterpret_cast<int32_t*>(next);

  switch (tokens.dtype) {
    case DType::kFloat32:
      return launch_assign_accumulate<float>(p, args, cuda_stream);
    case DType::kFloat16:
      return launch_assign_accumulate<__half>(p, args, cuda_stream);
    case DType::kBFloat16:
      return launch_assign_accumulate<__nv_bfloat16>(p, args, cuda_stream);
  }
  throw std::invalid_argument("unknown dtype code " +
                              std::to_string(static_cast<int32_t>(tokens.dtype)));
}

}  // namespace spt_fast
