// Prepares the centres for a pass: shifted, split for the tensor cores, in the order of their
// lanes.
//
// A squared distance of eq. 9, with c' = c - shift and c^ what the split keeps of it:
//   |x - c|^2 = |x - shift|^2 + base + slope * product,
//   half types: product = x . c^ (x as it is), base = |c'|^2 + 2 shift . c^ / scale,
//   float32:    product = (x - shift) . c',    base = |c'|^2,
// slope = -2 / scale. What c^ lacks is multiplied by x - shift only, never by the size of x. The
// scale, a power of two, keeps the centres within float16's range; for other types it is one. Norms
// are summed in float64.
#pragma once

#include <cub/warp/warp_reduce.cuh>
#include <type_traits>

#include "kmeans_cuda_products.cuh"

namespace spt_fast {

constexpr int kCenterThreads = 128;  // four warps share nothing: any number would do

// x = high + low but for rounding, high being the nearest value of the type: their bits, and what
// they add up to.
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

// A power of two that brings `largest` to [2^13, 2^14), two binades below float16's largest; one
// for the types that have float32's exponents.
template <typename T>
__device__ inline float split_scale(float largest) {
  if (!std::is_same_v<T, __half> || !(largest > 0.0f) || isinf(largest)) return 1.0f;
  return ldexpf(1.0f, min(13 - ilogbf(largest), 126));
}

// The largest |c'| of a centre; one warp.
__device__ inline float largest_difference(const float* center, const float* shift, int64_t width) {
  float largest = 0.0f;
  for (int64_t d = threadIdx.x % kWarp; d < width; d += kWarp) {
    largest = fmaxf(largest, fabsf(center[d] - shift[d]));
  }
  for (int other = kWarp / 2; other > 0; other /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, other));
  }
  return largest;
}

// packed, base and slope of the formula at the top; one warp per centre, padding included, which is
// zero at an infinite distance. IN centers [G, K, D], shift [G, D]; OUT packed, base, slope as in
// Problem. Lane map of packed[g, t, k / 8, l]: l = quad_row() * 4 + quad_lane() as in the b of a
// product; its four words are, of column tile t,
//   half types: high b[0], high b[1], low b[0], low b[1];   float32: columns quad_lane() + 4 i.
template <typename T>
__global__ void __launch_bounds__(kCenterThreads) pack_centers_kernel(Problem p) {
  constexpr bool kIsHalf = sizeof(T) == 2;
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

  // A quad writes the 64 bytes of a centre in a tile of columns.
  double correction = 0.0;
  for (int b = lane / kQuad; b < p.column_tiles; b += kWarp / kQuad) {
    uint32_t words[4] = {};
    for (int i = 0; i < 4; ++i) {
      const int64_t column = int64_t{b} * kTileColumns +
                             (kIsHalf ? i / 2 * 8 + pair_column() + i % 2 : 4 * i + quad_lane());
      const bool inside = is_center && column < width;
      const float difference = inside ? center[column] - shift[column] : 0.0f;
      if constexpr (kIsHalf) {
        const Split halves = split(difference * scale, T{});
        words[i / 2] |= halves.high << i % 2 * 16;
        words[2 + i / 2] |= halves.low << i % 2 * 16;
        if (inside) correction += static_cast<double>(shift[column]) * halves.kept;
      } else {
        words[i] = __float_as_uint(difference);
      }
    }
    const int64_t tile = (group * p.column_tiles + b) * p.center_tiles + k / kTileCenters;
    p.packed[tile * kWarp + k % kTileCenters * kQuad + quad_lane()] = {words[0], words[1], words[2],
                                                                       words[3]};
  }
  const double base = cub::WarpReduce<double>(storage[warp]).Sum(norm + 2.0 * correction / scale);
  if (lane == 0) {
    p.base[index] = is_center ? static_cast<float>(base) : INFINITY;
    p.slope[index] = -2.0f / scale;
  }
}

}  // namespace spt_fast
