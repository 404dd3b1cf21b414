// Twin of the part of CUB that the kernels use; see cuda_runtime.h.
#pragma once

#include "../../cuda_runtime.h"

namespace cub {

template <typename T, int kThreads>
struct BlockScan {
  struct TempStorage {
    T values[kThreads];
  };
  explicit BlockScan(TempStorage& storage_) : storage(storage_) {}

  void ExclusiveSum(T value, T& before) {
    storage.values[threadIdx.x] = value;
    __syncthreads();
    before = T{};
    for (unsigned thread = 0; thread < threadIdx.x; ++thread) before += storage.values[thread];
  }

 private:
  TempStorage& storage;
};

}  // namespace cub
