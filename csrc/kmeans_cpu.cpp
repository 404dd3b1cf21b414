// CPU driver of the k-means kernels: picks the instruction set, deals chunks of tokens out to
// threads and adds their sums up in a fixed order, so that results do not depend on the number of
// threads.
#include <algorithm>
#include <memory>
#include <stdexcept>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kmeans_cpu_isa.h"

namespace spt_fast {
namespace {

constexpr int64_t kChunkRows = 1024;  // float32 sums never span more tokens than this
constexpr int64_t kMaxSlots = 64;     // independent float64 sums over all groups

std::vector<const CpuKernels*> supported_kernels() {
  std::vector<const CpuKernels*> supported;
#ifdef SPT_HAVE_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    supported.push_back(&avx512::kernels());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    supported.push_back(&avx2::kernels());
  }
#endif
  supported.push_back(&baseline::kernels());
  return supported;
}

const CpuKernels& choose_kernels(const std::string& isa) {
  static const std::vector<const CpuKernels*> supported = supported_kernels();
  std::string names;
  for (const CpuKernels* kernels : supported) {
    if (isa.empty() || isa == kernels->name) return *kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  throw std::invalid_argument("isa must be one of " + names + ", got " + isa);
}

GroupTokens tokens_of_group(const TokenView& view, const float* shift, int64_t group) {
  const int64_t bytes = view.dtype == DType::kFloat32 ? 4 : 2;
  const char* base = static_cast<const char*>(view.data) + group * view.group_stride * bytes;
  return {base,
          view.dtype,
          view.inner,
          view.width,
          view.outer_stride,
          view.inner_stride,
          shift ? shift + group * view.width : nullptr};
}

template <class T>
T* offset_or_null(T* pointer, int64_t offset) {
  return pointer ? pointer + offset : nullptr;
}

// The centres of all groups in the panel layout of one instruction set.
class PackedGroups {
 public:
  PackedGroups(const CpuKernels& kernels, const float* centers, const float* shift, int64_t groups,
               int64_t num_centers, int64_t width)
      : num_centers_(num_centers), padded_(kernels.padded_centers(num_centers)), width_(width) {
    panels_.reset(new float[groups * padded_ * width]);
    half_norms_.reset(new float[groups * padded_]);
    for (int64_t g = 0; g < groups; ++g) {
      kernels.pack(centers + g * num_centers * width, offset_or_null(shift, g * width), num_centers,
                   width, panels_.get() + g * padded_ * width, half_norms_.get() + g * padded_);
    }
  }

  PackedCenters group(int64_t g) const {
    return {panels_.get() + g * padded_ * width_, half_norms_.get() + g * padded_, num_centers_};
  }

 private:
  int64_t num_centers_, padded_, width_;
  std::unique_ptr<float[]> panels_, half_norms_;
};

// How the tokens are cut: each group into chunks, and its chunks into `slots` contiguous runs,
// which are the unit of work. A function of the sizes alone.
struct Partition {
  Partition(int64_t groups, int64_t rows)
      : rows(rows),
        chunks((rows + kChunkRows - 1) / kChunkRows),
        slots(std::min(chunks, std::max<int64_t>(1, kMaxSlots / groups))) {}

  int64_t first_chunk(int64_t slot) const { return slot * chunks / slots; }
  int64_t begin(int64_t chunk) const { return chunk * kChunkRows; }
  int64_t end(int64_t chunk) const { return std::min(rows, begin(chunk) + kChunkRows); }

  int64_t rows, chunks, slots;
};

// Sums of one slot, wide enough to hold for any number of tokens.
struct SlotTotals {
  double* sums;    // [K, D]
  double* counts;  // [K]
  double inertia;
};

// Buffers of one thread.
struct ThreadBuffers {
  ThreadBuffers(int64_t scratch_floats, int64_t sum_floats)
      : scratch(scratch_floats), sums(sum_floats) {}
  std::vector<float> scratch, sums;
};

int useful_threads(int num_threads, int64_t tasks) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, tasks)));
}

// Index of the calling thread in its team.
int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

class Assignment {
 public:
  Assignment(const AssignArgs& args, const CpuKernels& kernels)
      : args_(args),
        kernels_(kernels),
        partition_(args.tokens.groups, args.tokens.rows()),
        packed_(kernels, args.centers, args.shift, args.tokens.groups, args.num_centers,
                args.tokens.width),
        totals_(args.tokens.groups * partition_.slots) {
    const int64_t per_slot = center_floats() + args.num_centers;
    storage_.reset(new double[per_slot * totals_.size()]);  // zeroed by the thread that uses it
    for (size_t i = 0; i < totals_.size(); ++i) {
      double* sums = storage_.get() + i * per_slot;
      totals_[i] = {sums, sums + center_floats(), 0.};
    }
  }

  void run(int num_threads) {
    const int64_t tasks = static_cast<int64_t>(totals_.size());
    const int threads = useful_threads(num_threads, tasks);
    std::vector<ThreadBuffers> buffers(
        threads, ThreadBuffers(kernels_.scratch_floats(args_.tokens.width), center_floats()));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task) run_slot(task, buffers[thread_index()]);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < args_.tokens.groups * args_.num_centers; ++row)
        reduce_center(row);
    }
    for (int64_t g = 0; g < args_.tokens.groups; ++g) {
      args_.inertia[g] = 0.;
      for (int64_t s = 0; s < partition_.slots; ++s) args_.inertia[g] += slot(g, s).inertia;
    }
  }

 private:
  int64_t center_floats() const { return args_.num_centers * args_.tokens.width; }
  SlotTotals& slot(int64_t group, int64_t s) { return totals_[group * partition_.slots + s]; }

  void run_slot(int64_t task, ThreadBuffers& buffers) {
    const int64_t group = task / partition_.slots;
    const int64_t s = task % partition_.slots;
    SlotTotals& total = totals_[task];
    std::fill(total.sums, total.counts + args_.num_centers, 0.);
    for (int64_t c = partition_.first_chunk(s); c < partition_.first_chunk(s + 1); ++c) {
      run_chunk(group, c, buffers, total);
    }
  }

  void run_chunk(int64_t group, int64_t c, ThreadBuffers& buffers, SlotTotals& total) {
    const int64_t rows = partition_.rows;
    std::fill(buffers.sums.begin(), buffers.sums.end(), 0.f);
    AssignChunk chunk;
    chunk.tokens = tokens_of_group(args_.tokens, args_.shift, group);
    chunk.centers = packed_.group(group);
    chunk.begin = partition_.begin(c);
    chunk.end = partition_.end(c);
    chunk.weights = offset_or_null(args_.weights, group * rows);
    chunk.scratch = buffers.scratch.data();
    chunk.sums = buffers.sums.data();
    chunk.counts = total.counts;
    chunk.inertia = &total.inertia;
    chunk.labels = offset_or_null(args_.labels, group * rows);
    chunk.distances = offset_or_null(args_.distances, group * rows);
    kernels_.assign(chunk);
    for (int64_t i = 0; i < center_floats(); ++i) total.sums[i] += buffers.sums[i];
  }

  // Adds the slots up in order and undoes the shift.
  void reduce_center(int64_t row) {
    const int64_t group = row / args_.num_centers, k = row % args_.num_centers;
    const int64_t width = args_.tokens.width;
    double* sum = args_.sums + row * width;
    double count = 0.;
    std::fill(sum, sum + width, 0.);
    for (int64_t s = 0; s < partition_.slots; ++s) {
      const double* part = slot(group, s).sums + k * width;
      for (int64_t d = 0; d < width; ++d) sum[d] += part[d];
      count += slot(group, s).counts[k];
    }
    args_.counts[row] = count;
    if (args_.shift == nullptr) return;
    const float* shift = args_.shift + group * width;
    for (int64_t d = 0; d < width; ++d) sum[d] += count * shift[d];
  }

  const AssignArgs& args_;
  const CpuKernels& kernels_;
  Partition partition_;
  PackedGroups packed_;
  std::vector<SlotTotals> totals_;
  std::unique_ptr<double[]> storage_;
};

}  // namespace

void assign_accumulate_cpu(const AssignArgs& args, int num_threads, const std::string& isa) {
  Assignment(args, choose_kernels(isa)).run(num_threads);
}

void distances_cpu(const DistanceArgs& args, int num_threads, const std::string& isa) {
  const CpuKernels& kernels = choose_kernels(isa);
  const TokenView& tokens = args.tokens;
  const Partition partition(tokens.groups, tokens.rows());
  const PackedGroups packed(kernels, args.centers, args.shift, tokens.groups, args.num_centers,
                            tokens.width);
  const int64_t tasks = tokens.groups * partition.chunks;
  const int threads = useful_threads(num_threads, tasks);
  std::vector<std::vector<float>> scratch(threads,
                                          std::vector<float>(kernels.scratch_floats(tokens.width)));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t group = task / partition.chunks, c = task % partition.chunks;
    kernels.distances({tokens_of_group(tokens, args.shift, group), packed.group(group),
                       partition.begin(c), partition.end(c), scratch[thread_index()].data(),
                       args.distances + group * partition.rows * args.num_centers});
  }
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : supported_kernels()) names.emplace_back(kernels->name);
  return names;
}

}  // namespace spt_fast
