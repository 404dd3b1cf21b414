// Prepares the centres for kmeans_cuda_screened.cuh: shifted, in the tokens' type, swizzled as
// warpgroups read them, and a bound on what that leaves out.
//
// With c' = c - shift = high / scale + low / scale,
//   |x - c|^2 = |x - shift|^2 + base + slope * (x - shift) . high + rest,  |rest| <= doubt |x -
//   shift|,
// base = |c'|^2, slope = -2 / scale, doubt = 2 / scale |low|. The scale is that of
// kmeans_cuda_centers.cuh.
#pragma once

#include "kmeans_cuda_centers.cuh"

namespace spt_fast {

constexpr int kMaxScreenCenters = 128;
// A chunk: 64 columns, in swizzled rows of 128 bytes.
constexpr int kChunkColumns = 64;
constexpr int kChunkRowBytes = 128;
constexpr int kChunksPerBlock = 3;
constexpr int kScreenColumns = kChunksPerBlock * kChunkColumns;
// A lane's products of a token: words of two bfloat16.
constexpr int kShareWords = 8;

// What a pass over the tokens needs of the centres.
struct ScreenedCenters {
  int half;               // centres of a warpgroup: 32, 56 or 64
  int blocks;             // of a cluster
  int columns_per_block;  // a multiple of kChunkColumns
  uint16_t* packed;       // [G, blocks, 3 chunks, 2 half, 64], swizzled
  float* offsets;         // [G, blocks, 128] shift . high of the block's columns
  float* lengths;         // [G, blocks, 128] |high| of the block's columns, rounded up
  float* base;            // [G, 128] by slot: |c'|^2, infinite in the padding
  float* slope;           // [G, 128] by slot: -2 / scale
  float* doubt;           // [G, 128] by slot: 2 / scale |low|, rounded up
};

// Products lie in the order in which lanes hold them. Slot 2w + c of lane q of warpgroup g (16
// slots each) is centre g half + 8w + 2q + c, if 8w < half; else -1.
__host__ __device__ inline int center_of_slot(int slot, int half) {
  const int lane = slot / (2 * kShareWords);
  const int word = slot % (2 * kShareWords) / 2;
  return 8 * word < half ? lane / 4 * half + 8 * word + 2 * (lane % 4) + slot % 2 : -1;
}

__host__ __device__ inline int slot_of_center(int center, int half) {
  const int in_half = center % half;
  const int lane = center / half * 4 + in_half % 8 / 2;
  return (lane * kShareWords + in_half / 8) * 2 + center % 2;
}

// What the tokens' type leaves out of a centre's value, times the scale.
template <typename T>
__device__ inline double split_low(float difference, float scale) {
  return static_cast<double>(difference) * scale - split(difference * scale, T{}).high_value;
}

// Where the 16 bytes that hold column `column` (of 64) of row `row` begin, in a swizzled chunk.
__host__ __device__ inline int swizzled_piece(int row, int column) {
  constexpr int kPieceColumns = 8;
  return row * kChunkRowBytes + ((column / kPieceColumns) ^ (row % 8)) * 16;
}

// One warp per slot and group. What is padding becomes zero, at an infinite distance.
template <typename T>
__global__ void __launch_bounds__(kCenterThreads)
    pack_screen_kernel(Problem p, ScreenedCenters screened) {
  __shared__ typename cub::WarpReduce<double>::TempStorage storage[kCenterThreads / kWarp];
  cub::WarpReduce<double> reduce(storage[threadIdx.x / kWarp]);
  const int lane = threadIdx.x % kWarp;
  const int64_t index =
      int64_t{blockIdx.x} * (kCenterThreads / kWarp) + threadIdx.x / kWarp;  // of group and slot
  if (index >= p.tokens.groups * kMaxScreenCenters) return;
  const int64_t group = index / kMaxScreenCenters;
  const int k = center_of_slot(static_cast<int>(index % kMaxScreenCenters), screened.half);
  const bool is_center = 0 <= k && k < p.num_centers;
  const int64_t width = p.tokens.width;
  const float* center = p.centers + (group * p.num_centers + (is_center ? k : 0)) * width;
  const float* shift = p.shift + group * width;
  const float scale = split_scale<T>(largest_difference(center, shift, width));

  double norm = 0.0;
  double low_norm = 0.0;
  const int rows = 2 * screened.half;
  for (int block = 0; block < screened.blocks; ++block) {
    uint16_t* packed = screened.packed +
                       (group * screened.blocks + block) * kChunksPerBlock * rows * kChunkColumns;
    double offset = 0.0;
    double length = 0.0;
    for (int i = lane; i < kScreenColumns; i += kWarp) {
      const int64_t column = int64_t{block} * screened.columns_per_block + i;
      const bool inside = is_center && i < screened.columns_per_block && column < width;
      const float difference = inside ? center[column] - shift[column] : 0.0f;
      const Split parts = split(difference * scale, T{});
      const double low = split_low<T>(difference, scale);
      norm += static_cast<double>(difference) * difference;
      low_norm += low * low;
      length += static_cast<double>(parts.high_value) * parts.high_value;
      if (inside) offset += static_cast<double>(shift[column]) * parts.high_value;
      if (k >= 0) {
        const int place = i / kChunkColumns * rows * kChunkRowBytes +
                          swizzled_piece(k, i % kChunkColumns) + i % 8 * 2;
        packed[place / 2] = static_cast<uint16_t>(parts.high);
      }
    }
    offset = reduce.Sum(offset);
    __syncwarp();
    length = reduce.Sum(length);
    __syncwarp();
    const int64_t part = (group * screened.blocks + block) * kMaxScreenCenters;
    if (lane == 0 && k >= 0) {
      screened.offsets[part + k] = static_cast<float>(offset);
      screened.lengths[part + k] = static_cast<float>(sqrt(length)) * 1.0001f;
    }
  }
  norm = reduce.Sum(norm);
  __syncwarp();
  low_norm = reduce.Sum(low_norm);
  if (lane == 0) {
    screened.base[index] = is_center ? static_cast<float>(norm) : INFINITY;
    screened.slope[index] = -2.0f / scale;
    screened.doubt[index] = 2.0f / scale * static_cast<float>(sqrt(low_norm)) * 1.0001f;
  }
}

}  // namespace spt_fast
