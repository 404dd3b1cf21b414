// Assign-and-accumulate and all squared distances on the GPU: the contract in kmeans.h.
//
// Chooses between two paths, lays the workspace out and enqueues the kernels. Up to 32 centres,
// without weights, take one read of the tokens; anything else takes a read for the labels and one
// for the sums. No atomics and a fixed order of every sum: results repeat to the bit. Neither path
// nor order depend on the number of multiprocessors, but the path does on the shared memory of the
// GPU. A token that is not finite goes to centre 0 at an infinite distance, so that the inertia
// shows it; the sums are not to be used then. Limits: 65535 groups, 2^31 - 1 centres.

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda_launch.cuh"
#include "kmeans.h"
#include "kmeans_cuda_accumulate.cuh"
#include "kmeans_cuda_assign.cuh"
#include "kmeans_cuda_centers.cuh"
#include "kmeans_cuda_one_read.cuh"
#include "kmeans_cuda_reduce.cuh"

namespace spt_fast {
namespace {

constexpr int64_t kMaxGridYZ = 65535;
// Runs of tokens have partial sums of their own. There are at most two, or eight of the sorted
// rows, for each multiprocessor of an H100, which keeps smaller and larger GPUs busy too. Each has
// at least kMinRows tokens, which cost more than the adding up of its sums.
constexpr int64_t kMaxRuns = 264;
constexpr int64_t kMaxSortedRuns = 1056;
constexpr int64_t kMinRows = 128;
constexpr int64_t kMinScanBytes = 64 << 10;
constexpr int64_t kAlignment = 256;  // of arrays in the workspace: that of cudaMalloc

// The rows of a group in `most` parts for all groups together, each with `least` rows at least.
// Depends on the sizes only, never on the GPU: the same input gives the same order of sums.
int64_t num_parts(const TokenView& tokens, int64_t most, int64_t least) {
  return std::clamp<int64_t>(tokens.rows() / least, 1, ceil_div(most, tokens.groups));
}
int64_t one_read_runs(const TokenView& tokens) { return num_parts(tokens, kMaxRuns, kMinRows); }
int64_t sorted_runs(const TokenView& tokens) { return num_parts(tokens, kMaxSortedRuns, kMinRows); }

// Hands out arrays of the workspace; with no workspace, measures it.
class Workspace {
 public:
  explicit Workspace(void* begin) : begin_(static_cast<char*>(begin)) {}

  template <typename V>
  V* take(int64_t count) {
    char* taken = begin_ ? begin_ + used_ : nullptr;
    used_ += ceil_div(count * int64_t{sizeof(V)}, kAlignment) * kAlignment;
    return reinterpret_cast<V*>(taken);
  }
  int64_t used() const { return used_; }

 private:
  char* begin_;
  int64_t used_ = 0;
};

// What both operations keep in the workspace. Returns the place for a mean of the centres [G, D].
float* take_centers(Problem& p, Workspace& workspace) {
  const int64_t padded = p.tokens.groups * p.center_tiles * kTileCenters;
  p.packed = workspace.take<uint4>(p.tokens.groups * p.column_tiles * p.center_tiles * kWarp);
  p.base = workspace.take<float>(padded);
  p.slope = workspace.take<float>(padded);
  return workspace.take<float>(p.tokens.groups * p.tokens.width);
}

// What only assign-and-accumulate does, for either path: which one it is depends on the GPU.
Sort take_sums(Problem& p, Workspace& workspace) {
  const int64_t groups = p.tokens.groups;
  const int64_t tokens = groups * p.rows;
  const bool may_read_once = p.num_centers <= kOneReadCenters && p.tokens.width <= kOneReadColumns;
  const int64_t once = may_read_once ? one_read_runs(p.tokens) * p.num_centers : 0;
  const int64_t twice = sorted_runs(p.tokens) + p.num_centers;
  p.partials =
      workspace.take<double>(groups * std::max(once, twice) * (p.tokens.width + kExtraColumns));
  p.distances = workspace.take<float>(tokens);
  p.labels = workspace.take<int32_t>(tokens);

  Sort sort{};
  // A share has fewer numbers than rows. CUB's scan takes 16 bytes for about a thousand of them.
  sort.shares = num_parts(p.tokens, kMaxSortedRuns, std::max(kMinRows, 4 * p.num_centers));
  const int64_t places = groups * p.num_centers * sort.shares;
  sort.places = workspace.take<int64_t>(places);
  sort.storage_bytes = places + kMinScanBytes;
  sort.storage = workspace.take<char>(sort.storage_bytes);
  sort.inertia = workspace.take<double>(groups * sort.shares);
  sort.rows = workspace.take<int64_t>(tokens);
  sort.labels = workspace.take<int32_t>(tokens);
  return sort;
}

Problem make_problem(const TokenView& tokens, int64_t num_centers) {
  Problem p{};
  p.tokens = tokens;
  p.rows = tokens.rows();
  if (tokens.outer_stride == tokens.inner * tokens.inner_stride) {
    // Rows are evenly spaced: token_offset() need not divide.
    p.tokens.inner = p.rows;
    p.tokens.outer = 1;
  }
  p.num_centers = num_centers;
  p.column_tiles = static_cast<int>(ceil_div(tokens.width, kTileColumns));
  p.center_tiles = std::max(kMinCenterTiles, static_cast<int>(ceil_div(num_centers, kTileCenters)));
  return p;
}

bool has_aligned_rows(const TokenView& tokens) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(tokens.data));
  const int64_t strides = tokens.group_stride | tokens.outer_stride | tokens.inner_stride;
  return (address | strides * element_bytes(tokens.dtype)) % 16 == 0;
}

void validate(const TokenView& tokens, int64_t num_centers) {
  if (tokens.groups > kMaxGridYZ) {
    throw std::invalid_argument("groups must be at most 65535 on CUDA, got " +
                                std::to_string(tokens.groups));
  }
  if (tokens.width < 1 || num_centers < 1 || num_centers > INT32_MAX - kTileCenters) {
    throw std::invalid_argument("width and num_centers must be positive, got " +
                                std::to_string(tokens.width) + " and " +
                                std::to_string(num_centers));
  }
}

template <typename Visitor>
void visit_dtype(DType dtype, const Visitor& visitor) {
  switch (dtype) {
    case DType::kFloat32:
      return visitor(float{});
    case DType::kFloat16:
      return visitor(__half{});
    case DType::kBFloat16:
      return visitor(__nv_bfloat16{});
  }
  throw std::invalid_argument("unknown dtype code " + std::to_string(static_cast<int32_t>(dtype)));
}

unsigned as_grid(int64_t blocks) {
  if (blocks > INT32_MAX) {
    throw std::invalid_argument(
        "too many tokens or centers for one launch on CUDA: " + std::to_string(blocks) + " blocks");
  }
  return static_cast<unsigned>(blocks);
}

template <typename T>
void launch_pack_centers(const Problem& p, cudaStream_t stream) {
  const int64_t warps = p.tokens.groups * p.center_tiles * kTileCenters;
  launch(pack_centers_kernel<T>, as_grid(ceil_div(warps, kCenterThreads / kWarp)), kCenterThreads,
         0, stream, p);
}

template <typename T>
void launch_assign(const Problem& p, cudaStream_t stream) {
  const int64_t stage = assign_stage_bytes(sizeof(T));
  const int64_t shift = int64_t{p.column_tiles} * kTileColumns * int64_t{sizeof(float)};
  const int64_t stages = std::min<int64_t>(
      kMaxAssignStages, (dynamic_shared_memory(assign_kernel<T>) - shift) / stage);
  if (stages < 2) {
    throw std::invalid_argument("width " + std::to_string(p.tokens.width) +
                                " is too large for the shared memory of this GPU");
  }
  AssignShape shape{};
  shape.stages = static_cast<int>(stages);
  shape.slabs = static_cast<int>(ceil_div(p.center_tiles, kSlabTiles));
  shape.tiles_per_slab = static_cast<int>(ceil_div(p.center_tiles, shape.slabs));
  shape.slabs = static_cast<int>(ceil_div(p.center_tiles, shape.tiles_per_slab));
  shape.steps_per_slab = static_cast<int>(ceil_div(p.column_tiles, step_tiles(sizeof(T))));
  const dim3 grid(as_grid(ceil_div(p.rows, kAssignRows)), as_grid(p.tokens.groups));
  launch(assign_kernel<T>, grid, kAssignThreads, static_cast<int>(stages * stage + shift), stream,
         p, shape);
}

template <typename T>
void launch_accumulate(const Problem& p, Sort sort, cudaStream_t stream) {
  const unsigned groups = as_grid(p.tokens.groups);
  const dim3 shares(as_grid(sort.shares), groups);
  launch(count_labels_kernel, shares, kWarp, 0, stream, p, sort);
  SPT_CUDA_CHECK(
      cub::DeviceScan::ExclusiveSum(sort.storage, sort.storage_bytes, sort.places, sort.places,
                                    p.tokens.groups * p.num_centers * sort.shares, stream));
  launch(sort_rows_kernel, shares, kWarp, 0, stream, p, sort);
  const int64_t columns = sizeof(uint4) / sizeof(T);
  const bool is_wide = p.is_aligned && p.tokens.width % columns == 0;
  const auto kernel = is_wide ? accumulate_kernel<T, uint4> : accumulate_kernel<T, T>;
  const int64_t warps = ceil_div(p.tokens.width, kWarp * (is_wide ? columns : 1));
  launch(kernel, dim3(as_grid(warps), as_grid(p.runs), groups), kWarp, 0, stream, p, sort);
}

// The one-read kernel and its shape, or no kernel.
struct OneRead {
  void (*kernel)(Problem, OneReadShape) = nullptr;
  OneReadShape shape;
};

template <typename T, int kRowTiles, int kColumnTiles>
OneRead try_one_read(const Problem& p) {
  static_assert(kMinCenterTiles == 3 && kOneReadCenters == 4 * kTileCenters);
  const OneReadShape shape = one_read_shape(p.tokens.width, p.center_tiles, sizeof(T), kRowTiles);
  const auto kernel = p.center_tiles == 3 ? one_read_kernel<T, kRowTiles, kColumnTiles, 3>
                                          : one_read_kernel<T, kRowTiles, kColumnTiles, 4>;
  const bool fits =
      shape.column_tiles_per_warp <= kColumnTiles && shape.bytes <= dynamic_shared_memory(kernel);
  return fits ? OneRead{kernel, shape} : OneRead{};
}

// Tiles of 32 tokens halve the barriers and the reading of centres; 16 fit where 32 do not.
template <typename T>
OneRead choose_one_read(const Problem& p) {
  if (p.weights || p.num_centers > kOneReadCenters || p.tokens.width > kOneReadColumns) return {};
  if constexpr (sizeof(T) == 4) {
    return try_one_read<T, 1, 6>(p);
  } else {
    const OneRead wide = try_one_read<T, 2, 6>(p);
    return wide.kernel ? wide : try_one_read<T, 1, 6>(p);
  }
}

template <typename T>
void launch_assign_accumulate(Problem p, Sort sort, const AssignArgs& args, cudaStream_t stream) {
  launch_pack_centers<T>(p, stream);
  const OneRead one_read = choose_one_read<T>(p);
  if (one_read.kernel) {
    sort = {};
    p.runs = one_read_runs(p.tokens);
    p.labels = args.labels;
    p.distances = args.distances;
    launch(one_read.kernel, dim3(as_grid(p.runs), as_grid(p.tokens.groups)), kOneReadThreads,
           one_read.shape.bytes, stream, p, one_read.shape);
  } else {
    p.runs = sorted_runs(p.tokens);
    if (args.labels) p.labels = args.labels;
    if (args.distances) p.distances = args.distances;
    launch_assign<T>(p, stream);
    launch_accumulate<T>(p, sort, stream);
  }
  const int64_t elements = p.tokens.groups * p.num_centers * (p.tokens.width + kExtraColumns);
  launch(reduce_kernel, as_grid(ceil_div(elements, kWarp)), kReduceThreads, 0, stream, p, sort,
         args.sums, args.counts, args.inertia);
}

void clear_outputs(const AssignArgs& args, cudaStream_t stream) {
  const int64_t centers = args.tokens.groups * args.num_centers;
  SPT_CUDA_CHECK(
      cudaMemsetAsync(args.sums, 0, centers * args.tokens.width * sizeof(double), stream));
  SPT_CUDA_CHECK(cudaMemsetAsync(args.counts, 0, centers * sizeof(double), stream));
  SPT_CUDA_CHECK(cudaMemsetAsync(args.inertia, 0, args.tokens.groups * sizeof(double), stream));
}

// Fills in what is left of the problem, and enqueues the mean of the centres if no shift is given.
void set_inputs(Problem& p, const float* centers, const float* shift, Workspace& workspace,
                cudaStream_t stream) {
  p.is_aligned = has_aligned_rows(p.tokens);
  p.centers = centers;
  float* mean = take_centers(p, workspace);
  p.shift = shift ? shift : mean;
  if (shift) return;
  const int64_t elements = p.tokens.groups * p.tokens.width;
  launch(mean_center_kernel, as_grid(ceil_div(elements, kCenterThreads)), kCenterThreads, 0, stream,
         centers, p.tokens.groups, p.num_centers, p.tokens.width, mean);
}

// The size of the workspace: that of the arrays which the operations take.
int64_t workspace_bytes(const TokenView& tokens, int64_t num_centers, bool with_sums) {
  if (tokens.groups < 1 || tokens.rows() < 1) return kAlignment;
  Problem p = make_problem(tokens, num_centers);
  Workspace workspace(nullptr);
  take_centers(p, workspace);
  if (with_sums) take_sums(p, workspace);
  return workspace.used();
}

}  // namespace

std::string cuda_why_not() {
  cudaFuncAttributes attributes{};
  const cudaError_t status =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(mean_center_kernel));
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return std::string("kernels built for " SPT_CUDA_ARCHS " do not run on this GPU: ") +
         cudaGetErrorString(status);
}

int64_t assign_accumulate_cuda_workspace(const AssignArgs& args) {
  return workspace_bytes(args.tokens, args.num_centers, true);
}

int64_t distances_cuda_workspace(const DistanceArgs& args) {
  return workspace_bytes(args.tokens, args.num_centers, false);
}

void assign_accumulate_cuda(const AssignArgs& args, void* workspace, void* stream) {
  const TokenView& tokens = args.tokens;
  if (tokens.groups < 1) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (tokens.rows() < 1) return clear_outputs(args, cuda_stream);
  validate(tokens, args.num_centers);
  if (!tokens.data || !args.centers || !args.sums || !args.counts || !args.inertia || !workspace) {
    throw std::invalid_argument("tokens, centers, sums, counts, inertia and workspace must be set");
  }

  Problem p = make_problem(tokens, args.num_centers);
  Workspace arrays(workspace);
  set_inputs(p, args.centers, args.shift, arrays, cuda_stream);
  const Sort sort = take_sums(p, arrays);
  p.weights = args.weights;
  visit_dtype(tokens.dtype, [&](auto element) {
    launch_assign_accumulate<decltype(element)>(p, sort, args, cuda_stream);
  });
}

void distances_cuda(const DistanceArgs& args, void* workspace, void* stream) {
  const TokenView& tokens = args.tokens;
  if (tokens.groups < 1 || tokens.rows() < 1) return;
  validate(tokens, args.num_centers);
  if (!tokens.data || !args.centers || !args.distances || !workspace) {
    throw std::invalid_argument("tokens, centers, distances and workspace must be set");
  }

  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Problem p = make_problem(tokens, args.num_centers);
  Workspace arrays(workspace);
  set_inputs(p, args.centers, args.shift, arrays, cuda_stream);
  p.all_distances = args.distances;
  visit_dtype(tokens.dtype, [&](auto element) {
    using T = decltype(element);
    launch_pack_centers<T>(p, cuda_stream);
    launch_assign<T>(p, cuda_stream);
  });
}

}  // namespace spt_fast
