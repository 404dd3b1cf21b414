// CPU driver of the k-means kernels: picks the instruction set, deals the tokens out to
// threads in shares and adds their sums up in a fixed order, so that results do not depend on the
// number of threads.
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

// Partial sums of one run. In float64, they hold for any number of tokens.
struct RunTotals {
  double* sums;    // [K, D]
  double* counts;  // [K]
  double inertia = 0.;
  double weighted_norms = 0.;
  int64_t num_changed = 0;
};

class Assignment {
 public:
  Assignment(const AssignArgs& args, const CpuKernels& kernels, const PackedGroups& centers,
             PrunedOutputs* pruned)
      : args_(args),
        kernels_(kernels),
        centers_(centers),
        pruned_(pruned),
        partition_(args.tokens.groups, args.tokens.rows()),
        totals_(args.tokens.groups * partition_.runs) {
    const int64_t per_run = center_floats() + args.num_centers;
    storage_.reset(new double[per_run * totals_.size()]);  // zeroed by the thread that uses it
    for (size_t i = 0; i < totals_.size(); ++i) {
      totals_[i].sums = storage_.get() + i * per_run;
      totals_[i].counts = totals_[i].sums + center_floats();
    }
  }

  void run(int num_threads) {
    const int64_t tasks = static_cast<int64_t>(totals_.size());
    std::vector<std::vector<float>> scratch(
        useful_threads(num_threads, tasks),
        std::vector<float>(kernels_.scratch_floats(args_.tokens.width, args_.num_centers)));
    parallel_for(num_threads, tasks,
                 [&](int64_t task, int thread) { add_run(task, scratch[thread].data()); });
    parallel_for(num_threads, args_.tokens.groups * args_.num_centers,
                 [&](int64_t row, int) { reduce_center(row); });
    for (int64_t g = 0; g < args_.tokens.groups; ++g) {
      args_.inertia[g] = 0.;
      for (int64_t run = 0; run < partition_.runs; ++run)
        args_.inertia[g] += totals_of(g, run).inertia;
    }
    if (pruned_ == nullptr) return;
    for (const RunTotals& totals : totals_) {
      pruned_->weighted_norms += totals.weighted_norms;
      pruned_->num_changed += totals.num_changed;
    }
  }

 private:
  int64_t center_floats() const { return args_.num_centers * args_.tokens.width; }
  RunTotals& totals_of(int64_t group, int64_t run) {
    return totals_[group * partition_.runs + run];
  }

  void add_run(int64_t task, float* scratch) {
    const int64_t group = task / partition_.runs;
    const int64_t run = task % partition_.runs;
    RunTotals& total = totals_[task];
    std::fill(total.sums, total.counts + args_.num_centers, 0.);
    for (int64_t i = partition_.first_share(run); i < partition_.first_share(run + 1); ++i) {
      add_share(group, i, scratch, total);
    }
  }

  void add_share(int64_t group, int64_t index, float* scratch, RunTotals& total) {
    const int64_t rows = partition_.rows;
    AssignShare share;
    share.tokens = tokens_of_group(args_.tokens, args_.shift, group);
    share.centers = centers_.group(group);
    share.begin = partition_.begin(index);
    share.end = partition_.end(index);
    share.weights = offset_or_null(args_.weights, group * rows);
    share.scratch = scratch;
    share.sums = total.sums;
    share.counts = total.counts;
    share.inertia = &total.inertia;
    share.labels = offset_or_null(args_.labels, group * rows);
    share.distances = offset_or_null(args_.distances, group * rows);
    share.bounds = pruned_ ? &pruned_->bounds : nullptr;
    share.weighted_norms = &total.weighted_norms;
    share.num_changed = &total.num_changed;
    kernels_.assign(share);
  }

  // Adds the runs up in order, and undoes the shift where sums are wanted of the tokens as given.
  void reduce_center(int64_t row) {
    const int64_t group = row / args_.num_centers, k = row % args_.num_centers;
    const int64_t width = args_.tokens.width;
    double* sum = args_.sums + row * width;
    double count = 0.;
    std::fill(sum, sum + width, 0.);
    for (int64_t run = 0; run < partition_.runs; ++run) {
      const double* partial = totals_of(group, run).sums + k * width;
      for (int64_t d = 0; d < width; ++d) sum[d] += partial[d];
      count += totals_of(group, run).counts[k];
    }
    args_.counts[row] = count;
    if (args_.shift == nullptr || pruned_) return;
    const float* shift = args_.shift + group * width;
    for (int64_t d = 0; d < width; ++d) sum[d] += count * shift[d];
  }

  const AssignArgs& args_;
  const CpuKernels& kernels_;
  const PackedGroups& centers_;
  PrunedOutputs* pruned_;
  Partition partition_;
  std::vector<RunTotals> totals_;
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
                 int num_threads, PrunedOutputs* pruned) {
  Assignment(args, kernels, centers, pruned).run(num_threads);
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
  const int64_t tasks = tokens.groups * partition.shares;
  std::vector<std::vector<float>> scratch(
      useful_threads(num_threads, tasks),
      std::vector<float>(kernels.scratch_floats(tokens.width, args.num_centers)));
  parallel_for(num_threads, tasks, [&](int64_t task, int thread) {
    const int64_t group = task / partition.shares, share = task % partition.shares;
    kernels.distances({tokens_of_group(tokens, args.shift, group), packed.group(group),
                       partition.begin(share), partition.end(share), scratch[thread].data(),
                       args.distances + group * partition.rows * args.num_centers});
  });
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : supported_kernels()) names.emplace_back(kernels->name);
  return names;
}

}  // namespace spt_fast
