// Twin of the part of CUB that the kernels use; see cuda_runtime.h.
#pragma once

#include "../../cuda_runtime.h"

namespace cub {

template <typename T>
struct WarpScan {
  struct TempStorage {};
  explicit WarpScan(TempStorage&) {}
  void ExclusiveSum(T value, T& before, T& total) {
    const auto shown = emulation::show(value);
    before = total = T{};
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      if (lane == emulation::lane()) before = total;
      total += shown[lane];
    }
  }
};

}  // namespace cub
