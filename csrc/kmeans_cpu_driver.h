// What the CPU drivers share: the choice of the instruction set, packed centres, chunks of tokens.
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

constexpr int64_t kChunkRows = 1024;  // tokens that one thread works on before it takes others
constexpr int64_t kMaxSlots = 64;     // independent sums over all groups

// How the tokens are cut: each group into chunks, and its chunks into `slots` contiguous runs,
// which are the unit of work where sums are made. A function of the sizes alone.
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

// What a pass over one group with bounds returns besides.
struct BoundedPass {
  TokenBounds bounds;   // OUT
  double total = 0.;    // OUT weighted sum of the norms
  int64_t changed = 0;  // OUT labels that are new
};

// One pass over all tokens; `centers` are those of `args`, in the wide layout. With `bounded` the
// one group's sums stay in shifted coordinates.
void assign_pass(const AssignArgs& args, const CpuKernels& kernels, const PackedGroups& centers,
                 int num_threads, BoundedPass* bounded);

}  // namespace spt_fast
