// What the CPU drivers have in common: the choice of the instruction set, packed centres, and how
// tokens are cut.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>

#include "kmeans_cpu_isa.h"

namespace spt_fast {

const CpuKernels& choose_kernels(const std::string& isa);

GroupTokens tokens_of_group(const TokenView& view, const float* shift, int64_t group);

template <class T>
T* offset_or_null(T* pointer, int64_t offset) {
  return pointer ? pointer + offset : nullptr;
}

// The centres of all groups in a panel layout of one instruction set.
class PackedGroups {
 public:
  PackedGroups(const CpuKernels& kernels, const float* centers, const float* shift, int64_t groups,
               int64_t num_centers, int64_t width, Layout layout = Layout::kWide);

  PackedCenters group(int64_t g) const {
    return {panels_.get() + g * padded_ * width_, half_norms_.get() + g * padded_, num_centers_};
  }

 private:
  int64_t num_centers_, padded_, width_;
  std::unique_ptr<float[]> panels_, half_norms_;
};

constexpr int64_t kShareRows = 1024;  // tokens that one thread works on before it takes others
constexpr int64_t kMaxRuns = 64;      // partial sums over all groups: bounds their memory

// How the tokens are cut: each group into shares, which a thread takes one at a time, and its
// shares into `runs` of neighbours, which have partial sums of their own where sums are made. A
// function of the sizes alone, so that the order of the sums does not depend on the number of
// threads.
struct Partition {
  Partition(int64_t groups, int64_t rows)
      : rows(rows),
        shares((rows + kShareRows - 1) / kShareRows),
        runs(std::min(shares, std::max<int64_t>(1, kMaxRuns / groups))) {}

  int64_t first_share(int64_t run) const { return run * shares / runs; }
  int64_t begin(int64_t share) const { return share * kShareRows; }
  int64_t end(int64_t share) const { return std::min(rows, begin(share) + kShareRows); }

  int64_t rows, shares, runs;
};

// What PrunedPasses wants of a pass over one group, besides sums and counts.
struct PrunedOutputs {
  TokenBounds bounds;          // OUT
  double weighted_norms = 0.;  // OUT weighted sum of the norms
  int64_t num_changed = 0;     // OUT labels unlike those that bounds held
};

// One pass over all tokens; `centers` are those of `args`, in the wide layout. With `pruned`, which
// may be null, there is one group, and its sums stay in shifted coordinates.
void assign_pass(const AssignArgs& args, const CpuKernels& kernels, const PackedGroups& centers,
                 int num_threads, PrunedOutputs* pruned);

}  // namespace spt_fast
