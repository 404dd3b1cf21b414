// CPU driver of the k-means kernels: picks the instruction set, deals chunks of tokens out to
// threads and adds their sums up in a fixed order, so that results do not depend on the number of
// threads.
#include <stdexcept>

#include "kmeans_cpu_driver.h"
#include "parallel.h"

namespace spt_fast {
namespace {

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

// Sums of one slot. In float64, they hold for any number of tokens.
struct SlotTotals {
  double* sums;    // [K, D]
  double* counts;  // [K]
  double inertia = 0., total = 0.;
  int64_t changed = 0;
};

class Assignment {
 public:
  Assignment(const AssignArgs& args, const CpuKernels& kernels, const PackedGroups& centers,
             BoundedPass* bounded)
      : args_(args),
        kernels_(kernels),
        centers_(centers),
        bounded_(bounded),
        partition_(args.tokens.groups, args.tokens.rows()),
        totals_(args.tokens.groups * partition_.slots) {
    const int64_t per_slot = center_floats() + args.num_centers;
    storage_.reset(new double[per_slot * totals_.size()]);  // zeroed by the thread that uses it
    for (size_t i = 0; i < totals_.size(); ++i) {
      totals_[i].sums = storage_.get() + i * per_slot;
      totals_[i].counts = totals_[i].sums + center_floats();
    }
  }

  void run(int num_threads) {
    const int64_t tasks = static_cast<int64_t>(totals_.size());
    std::vector<std::vector<float>> scratch(
        useful_threads(num_threads, tasks),
        std::vector<float>(kernels_.scratch_floats(args_.tokens.width, args_.num_centers)));
    parallel_for(num_threads, tasks,
                 [&](int64_t task, int thread) { run_slot(task, scratch[thread].data()); });
    parallel_for(num_threads, args_.tokens.groups * args_.num_centers,
                 [&](int64_t row, int) { reduce_center(row); });
    for (int64_t g = 0; g < args_.tokens.groups; ++g) {
      args_.inertia[g] = 0.;
      for (int64_t s = 0; s < partition_.slots; ++s) args_.inertia[g] += slot(g, s).inertia;
    }
    if (bounded_ == nullptr) return;
    for (const SlotTotals& totals : totals_) {
      bounded_->total += totals.total;
      bounded_->changed += totals.changed;
    }
  }

 private:
  int64_t center_floats() const { return args_.num_centers * args_.tokens.width; }
  SlotTotals& slot(int64_t group, int64_t s) { return totals_[group * partition_.slots + s]; }

  void run_slot(int64_t task, float* scratch) {
    const int64_t group = task / partition_.slots;
    const int64_t s = task % partition_.slots;
    SlotTotals& total = totals_[task];
    std::fill(total.sums, total.counts + args_.num_centers, 0.);
    for (int64_t c = partition_.first_chunk(s); c < partition_.first_chunk(s + 1); ++c) {
      run_chunk(group, c, scratch, total);
    }
  }

  void run_chunk(int64_t group, int64_t c, float* scratch, SlotTotals& total) {
    const int64_t rows = partition_.rows;
    AssignChunk chunk;
    chunk.tokens = tokens_of_group(args_.tokens, args_.shift, group);
    chunk.centers = centers_.group(group);
    chunk.begin = partition_.begin(c);
    chunk.end = partition_.end(c);
    chunk.weights = offset_or_null(args_.weights, group * rows);
    chunk.scratch = scratch;
    chunk.sums = total.sums;
    chunk.counts = total.counts;
    chunk.inertia = &total.inertia;
    chunk.labels = offset_or_null(args_.labels, group * rows);
    chunk.distances = offset_or_null(args_.distances, group * rows);
    chunk.bounds = bounded_ ? &bounded_->bounds : nullptr;
    chunk.total = &total.total;
    chunk.changed = &total.changed;
    kernels_.assign(chunk);
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
    if (args_.shift == nullptr || bounded_) return;
    const float* shift = args_.shift + group * width;
    for (int64_t d = 0; d < width; ++d) sum[d] += count * shift[d];
  }

  const AssignArgs& args_;
  const CpuKernels& kernels_;
  const PackedGroups& centers_;
  BoundedPass* bounded_;
  Partition partition_;
  std::vector<SlotTotals> totals_;
  std::unique_ptr<double[]> storage_;
};

}  // namespace

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
  const int64_t bytes = element_bytes(view.dtype);
  const char* base = static_cast<const char*>(view.data) + group * view.group_stride * bytes;
  return {base,
          view.dtype,
          view.inner,
          view.width,
          view.outer_stride,
          view.inner_stride,
          offset_or_null(shift, group * view.width)};
}

PackedGroups::PackedGroups(const CpuKernels& kernels, const float* centers, const float* shift,
                           int64_t groups, int64_t num_centers, int64_t width, Layout layout)
    : num_centers_(num_centers),
      padded_(kernels.padded_centers(num_centers, layout)),
      width_(width),
      panels_(new float[groups * padded_ * width]),
      half_norms_(new float[groups * padded_]) {
  for (int64_t g = 0; g < groups; ++g) {
    kernels.pack(centers + g * num_centers * width, offset_or_null(shift, g * width), num_centers,
                 width, layout, panels_.get() + g * padded_ * width,
                 half_norms_.get() + g * padded_);
  }
}

void assign_pass(const AssignArgs& args, const CpuKernels& kernels, const PackedGroups& centers,
                 int num_threads, BoundedPass* bounded) {
  Assignment(args, kernels, centers, bounded).run(num_threads);
}

void assign_accumulate_cpu(const AssignArgs& args, int num_threads, const std::string& isa) {
  const CpuKernels& kernels = choose_kernels(isa);
  const PackedGroups centers(kernels, args.centers, args.shift, args.tokens.groups,
                             args.num_centers, args.tokens.width);
  assign_pass(args, kernels, centers, num_threads, nullptr);
}

void distances_cpu(const DistanceArgs& args, int num_threads, const std::string& isa) {
  const CpuKernels& kernels = choose_kernels(isa);
  const TokenView& tokens = args.tokens;
  const Partition partition(tokens.groups, tokens.rows());
  const PackedGroups packed(kernels, args.centers, args.shift, tokens.groups, args.num_centers,
                            tokens.width);
  const int64_t tasks = tokens.groups * partition.chunks;
  std::vector<std::vector<float>> scratch(
      useful_threads(num_threads, tasks),
      std::vector<float>(kernels.scratch_floats(tokens.width, args.num_centers)));
  parallel_for(num_threads, tasks, [&](int64_t task, int thread) {
    const int64_t group = task / partition.chunks, c = task % partition.chunks;
    kernels.distances({tokens_of_group(tokens, args.shift, group), packed.group(group),
                       partition.begin(c), partition.end(c), scratch[thread].data(),
                       args.distances + group * partition.rows * args.num_centers});
  });
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : supported_kernels()) names.emplace_back(kernels->name);
  return names;
}

}  // namespace spt_fast
