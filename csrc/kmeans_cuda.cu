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

// What only assign-and-accumulate does, for either path: which one it is depends on the GPU.
Sort take_sums(Problem& p, bool corrects, Workspace& workspace) {
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
  sort.corrects = corrects;
  sort.rows = corrects ? 2 * p.rows : p.rows;
  sort.unsorted = corrects ? workspace.take<int32_t>(groups * sort.rows) : p.labels;
  // A share has fewer numbers than rows. CUB's scan takes 16 bytes for about a thousand of them.
  sort.shares = num_parts(p.tokens, kMaxSortedRuns, std::max(kMinRows, 4 * p.num_centers));
  const int64_t places = groups * p.num_centers * sort.shares;
  sort.places = workspace.take<int64_t>(places);
  sort.storage_bytes = places + kMinScanBytes;
  sort.storage = workspace.take<char>(sort.storage_bytes);
  sort.inertia = workspace.take<double>(groups * sort.shares);
  sort.sorted = workspace.take<int64_t>(groups * sort.rows);
  sort.labels = workspace.take<int32_t>(groups * sort.rows);
  return sort;
}

bool has_aligned_rows(const TokenView& tokens) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(tokens.data));
  const int64_t strides = tokens.group_stride | tokens.outer_stride | tokens.inner_stride;
  return (address | strides * element_bytes(tokens.dtype)) % 16 == 0;
}

// The problem of AssignArgs or DistanceArgs, and what both keep in the workspace.
template <typename Args>
Problem make_problem(const Args& args, Workspace& workspace) {
  const TokenView& tokens = args.tokens;
  Problem p{};
  p.tokens = tokens;
  p.is_aligned = has_aligned_rows(tokens);
  p.rows = tokens.rows();
  if (tokens.outer_stride == tokens.inner * tokens.inner_stride) {
    // Rows are evenly spaced: token_offset() need not divide.
    p.tokens.inner = p.rows;
    p.tokens.outer = 1;
  }
  p.centers = args.centers;
  p.shift = args.shift;
  p.num_centers = args.num_centers;
  p.column_tiles = static_cast<int>(ceil_div(tokens.width, kTileColumns));
  p.center_tiles =
      std::max(kMinCenterTiles, static_cast<int>(ceil_div(p.num_centers, kTileCenters)));
  const int64_t padded = tokens.groups * p.center_tiles * kTileCenters;
  p.packed = workspace.take<uint4>(tokens.groups * p.column_tiles * p.center_tiles * kWarp);
  p.base = workspace.take<float>(padded);
  p.slope = workspace.take<float>(padded);
  return p;
}

void validate(const TokenView& tokens, int64_t num_centers) {
  if (tokens.groups < 1 || tokens.rows() < 1 || tokens.width < 1) {
    throw std::invalid_argument("tokens must not be empty");
  }
  if (tokens.groups > kMaxGridYZ) {
    throw std::invalid_argument("groups must be at most 65535 on CUDA, got " +
                                std::to_string(tokens.groups));
  }
  if (num_centers < 1 || num_centers > INT32_MAX - kTileCenters) {
    throw std::invalid_argument("num_centers must be positive, and far below 2^31, got " +
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
void launch_accumulate(const Problem& p, Sort sort, int32_t* last, cudaStream_t stream) {
  const unsigned groups = as_grid(p.tokens.groups);
  const dim3 shares(as_grid(sort.shares), groups);
  launch(compare_labels_kernel, shares, kWarp, 0, stream, p, sort, last);
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
    if (args.labels && !sort.corrects) p.labels = sort.unsorted = args.labels;
    if (args.distances) p.distances = args.distances;
    launch_assign<T>(p, stream);
    launch_accumulate<T>(p, sort, sort.corrects ? args.labels : nullptr, stream);
  }
  const int64_t elements = p.tokens.groups * p.num_centers * (p.tokens.width + kExtraColumns);
  launch(reduce_kernel, as_grid(ceil_div(elements, kWarp)), kReduceThreads, 0, stream, p, sort,
         args.sums, args.counts, args.inertia);
}

}  // namespace

std::string cuda_why_not() {
  cudaFuncAttributes attributes{};
  const cudaError_t status =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(reduce_kernel));
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return std::string("kernels built for " SPT_CUDA_ARCHS " do not run on this GPU: ") +
         cudaGetErrorString(status);
}

int64_t assign_accumulate_cuda_workspace(const AssignArgs& args) {
  Workspace workspace(nullptr);
  Problem p = make_problem(args, workspace);
  take_sums(p, args.corrects, workspace);
  return workspace.used();
}

int64_t distances_cuda_workspace(const DistanceArgs& args) {
  Workspace workspace(nullptr);
  make_problem(args, workspace);
  return workspace.used();
}

void assign_accumulate_cuda(const AssignArgs& args, void* workspace, void* stream) {
  validate(args.tokens, args.num_centers);
  if (!args.tokens.data || !args.centers || !args.shift || !args.sums || !args.counts ||
      !args.inertia || !workspace) {
    throw std::invalid_argument(
        "tokens, centers, shift, sums, counts, inertia and workspace must be set");
  }
  if (args.corrects && (!args.labels || args.weights)) {
    throw std::invalid_argument("corrects needs labels, and takes no weights");
  }

  Workspace arrays(workspace);
  Problem p = make_problem(args, arrays);
  const Sort sort = take_sums(p, args.corrects, arrays);
  p.weights = args.weights;
  visit_dtype(p.tokens.dtype, [&](auto element) {
    launch_assign_accumulate<decltype(element)>(p, sort, args, static_cast<cudaStream_t>(stream));
  });
}

void distances_cuda(const DistanceArgs& args, void* workspace, void* stream) {
  validate(args.tokens, args.num_centers);
  if (!args.tokens.data || !args.centers || !args.shift || !args.distances || !workspace) {
    throw std::invalid_argument("tokens, centers, shift, distances and workspace must be set");
  }

  Workspace arrays(workspace);
  Problem p = make_problem(args, arrays);
  p.all_distances = args.distances;
  visit_dtype(p.tokens.dtype, [&](auto element) {
    using T = decltype(element);
    launch_pack_centers<T>(p, static_cast<cudaStream_t>(stream));
    launch_assign<T>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace spt_fast
