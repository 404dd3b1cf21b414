// The tokens that kmeans_cuda_screened.cuh leaves: their lists become one list per group, which
// assign_kernel and accumulate_kernel go through like any other tokens.
#pragma once

#include "kmeans_cuda_screened.cuh"

namespace spt_fast {

constexpr int kRestThreads = 256;

// One block per list and group: copies the list behind those before it.
__global__ void __launch_bounds__(kRestThreads)
    gather_lists_kernel(Undecided undecided, int64_t rows, uint32_t* list, int64_t* listed) {
  const int64_t group = blockIdx.y;
  const int32_t* lengths = undecided.lengths + group * gridDim.x;
  int64_t begin = 0;
#pragma unroll 8
  for (unsigned i = 0; i < blockIdx.x; ++i) begin += lengths[i];
  const int32_t length = lengths[blockIdx.x];
  const uint32_t* source = undecided.lists + (group * gridDim.x + blockIdx.x) * undecided.list_rows;
  for (int32_t i = threadIdx.x; i < length; i += kRestThreads) {
    list[group * rows + begin + i] = source[i];
  }
  if (blockIdx.x + 1 == gridDim.x && threadIdx.x == 0) listed[group] = begin + length;
}

}  // namespace spt_fast
