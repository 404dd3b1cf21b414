// Prepares the centres for a pass: shifted, split for the tensor cores, in fragment order.
//
// A few microseconds for K * D values. With c' = c - shift and c^ what the split keeps of it,
//   |x - c|^2 = |x - shift|^2 + base + slope * product,
//   half types: product = x . c^ (x as it is), base = |c'|^2 + 2 shift . c^ / scale,
//   float32:    product = (x - shift) . c',    base = |c'|^2,
// slope = -2 / scale. So what c^ lacks meets x - shift only, never the size of x. The scale, a
// power of two, keeps float16's centres clear of its range; elsewhere it is one. Norms are summed
// in float64. A missing shift is replaced by the mean of the centres.
#pragma once

#include <cub/warp/warp_reduce.cuh>

#include "kmeans_cuda_problem.cuh"

namespace spt_fast {

constexpr int kCenterThreads = 128;

// One thread per element of [G, D].
__global__ void __launch_bounds__(kCenterThreads)
    mean_center_kernel(const float* centers, int64_t groups, int64_t num_centers, int64_t width,
                       float* shift) {
  const int64_t index = int64_t{blockIdx.x} * kCenterThreads + threadIdx.x;
  if (index >= groups * width) return;
  const float* first = centers + index / width * num_centers * width + index % width;
  double sum = 0.0;
  for (int64_t k = 0; k < num_centers; ++k) sum += first[k * width];
  shift[index] = static_cast<float>(sum / static_cast<double>(num_centers));
}

// Bits of the two values that `x` is split in, the larger one first, and what they add up to.
struct Split {
  uint32_t high;
  uint32_t low;
  float kept;
};

__device__ inline Split split(float x, __nv_bfloat16) {
  const __nv_bfloat16 high = __float2bfloat16_rn(x);
  const __nv_bfloat16 low = __float2bfloat16_rn(x - to_float(high));
  return {__bfloat16_as_ushort(high), __bfloat16_as_ushort(low), to_float(high) + to_float(low)};
}

__device__ inline Split split(float x, __half) {
  const __half high = __float2half_rn(x);
  const __half low = __float2half_rn(x - to_float(high));
  return {__half_as_ushort(high), __half_as_ushort(low), to_float(high) + to_float(low)};
}

// A power of two that brings `largest` to [2^13, 2^14); one for the types with float32's exponents.
template <typename T>
__device__ inline float split_scale(float) {
  return 1.0f;
}
template <>
__device__ inline float split_scale<__half>(float largest) {
  if (!(largest > 0.0f) || isinf(largest)) return 1.0f;
  return ldexpf(1.0f, min(13 - ilogbf(largest), 126));
}

// The largest |c'| of a centre; one warp.
__device__ inline float largest_difference(const float* center, const float* shift, int64_t width) {
  float largest = 0.0f;
  for (int64_t d = threadIdx.x % kWarp; d < width; d += kWarp) {
    largest = fmaxf(largest, fabsf(center[d] - shift[d]));
  }
  for (int other = kWarp / 2; other > 0; other /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
  }
  return largest;
}

// One warp per centre, padding included: a padding centre is zero, at an infinite distance.
template <typename T>
__global__ void __launch_bounds__(kCenterThreads) pack_centers_kernel(Problem p) {
  constexpr bool kIsHalf = sizeof(T) == 2;
  constexpr int kQuad = 4;
  __shared__ typename cub::WarpReduce<double>::TempStorage storage[kCenterThreads / kWarp];

  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t padded = int64_t{p.center_tiles} * kTileCenters;
  const int64_t index = int64_t{blockIdx.x} * (kCenterThreads / kWarp) + warp;
  if (index >= p.tokens.groups * padded) return;
  const int64_t group = index / padded;
  const int64_t k = index - group * padded;
  const bool is_center = k < p.num_centers;
  const int64_t width = p.tokens.width;
  const float* center = p.centers + (group * p.num_centers + (is_center ? k : 0)) * width;
  const float* shift = p.shift + group * width;

  double norm = 0.0;
  for (int64_t d = lane; d < width; d += kWarp) {
    const float difference = center[d] - shift[d];
    norm += static_cast<double>(difference) * difference;
  }
  const float scale = split_scale<T>(largest_difference(center, shift, width));

  // Four lanes write the 64 bytes of a centre in a block of 16 columns.
  double correction = 0.0;
  const int quad = lane % kQuad;
  for (int b = lane / kQuad; b < p.column_blocks; b += kWarp / kQuad) {
    uint32_t words[4] = {};
    for (int i = 0; i < 4; ++i) {
      const int64_t column =
          int64_t{b} * kBlockColumns + (kIsHalf ? i / 2 * 8 + 2 * quad + i % 2 : 4 * i + quad);
      const bool inside = is_center && column < width;
      const float difference = inside ? center[column] - shift[column] : 0.0f;
      if constexpr (kIsHalf) {
        const Split parts = split(difference * scale, T{});
        words[i / 2] |= parts.high << i % 2 * 16;
        words[2 + i / 2] |= parts.low << i % 2 * 16;
        if (inside) correction += static_cast<double>(shift[column]) * parts.kept;
      } else {
        words[i] = __float_as_uint(difference);
      }
    }
    const int64_t tile = (group * p.column_blocks + b) * p.center_tiles + k / kTileCenters;
    p.packed[tile * kWarp + k % kTileCenters * kQuad + quad] = {words[0], words[1], words[2],
                                                                words[3]};
  }
  const double base = cub::WarpReduce<double>(storage[warp]).Sum(norm + 2.0 * correction / scale);
  if (lane == 0) {
    p.base[index] = is_center ? static_cast<float>(base) : INFINITY;
    p.slope[index] = -2.0f / scale;
  }
}

}  // namespace spt_fast
