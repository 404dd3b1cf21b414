// Copies rows of tokens to shared memory: asynchronously, 16 bytes at a time, each warp its own.
//
// Rows whose addresses are not multiples of 16 bytes take 4-byte copies or, at worst, element
// loads. What lies outside the tokens arrives as zeros.
#pragma once

#include "kmeans_cuda_problem.cuh"

namespace spt_fast {

constexpr int kCopyLanes = 4;  // neighbouring lanes that copy 64 adjacent bytes of a row

// 16 bytes from `source` to `target`, of which the first `left` elements exist (none if negative).
template <typename T>
__device__ inline void copy_piece(unsigned char* target, const T* source, int64_t left,
                                  Granule granule) {
  constexpr int kElements = 16 / sizeof(T);
  const int count = static_cast<int>(min(max(left, int64_t{0}), int64_t{kElements}));
  if (granule == Granule::k16) {
    copy_async_16(target, source, count * static_cast<int>(sizeof(T)));
  } else if (granule == Granule::k4) {
    constexpr int kStep = 4 / sizeof(T);
    for (int e = 0; e < kElements; e += kStep) {
      const int inside = min(max(count - e, 0), kStep);
      copy_async_4(target + e * sizeof(T), inside ? source + e : source,
                   inside * static_cast<int>(sizeof(T)));
    }
  } else {
    alignas(16) T values[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) values[e] = e < count ? source[e] : T{};
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(values);
  }
}

// Columns [first_column, first_column + pieces * 16 bytes) of `kRows` <= 32 rows from `first_row`
// on, those from `end` on as zeros, to target, target + stride, ... One warp; nothing is awaited.
template <typename T, int kRows>
__device__ inline void copy_rows(unsigned char* target, int stride, const Problem& p,
                                 const T* tokens, int64_t first_row, int64_t end,
                                 int64_t first_column, int pieces) {
  constexpr int kStep = kWarp / kCopyLanes;
  constexpr int kElements = 16 / sizeof(T);
  const int lane = threadIdx.x % kWarp;
  const int64_t own_offset = token_offset(p.tokens, min(first_row + lane % kRows, end - 1));
  const bool is_whole = p.granule == Granule::k16 && first_row + kRows <= end &&
                        first_column + pieces * kElements <= p.tokens.width;
  target += lane / kCopyLanes * stride + lane % kCopyLanes * 16;
  tokens += first_column + lane % kCopyLanes * kElements;
#pragma unroll
  for (int first = 0; first < kRows; first += kStep) {
    const int row = first + lane / kCopyLanes;
    const T* source = tokens + __shfl_sync(kAllLanes, own_offset, row);
    unsigned char* next = target + first * stride;
    if (is_whole) {
      for (int piece = lane % kCopyLanes; piece < pieces; piece += kCopyLanes) {
        copy_async_16(next, source, 16);
        next += kCopyLanes * 16;
        source += kCopyLanes * kElements;
      }
    } else {
      const int64_t width = first_row + row < end ? p.tokens.width : 0;
      for (int piece = lane % kCopyLanes; piece < pieces; piece += kCopyLanes) {
        copy_piece(next, source, width - first_column - piece * kElements, p.granule);
        next += kCopyLanes * 16;
        source += kCopyLanes * kElements;
      }
    }
  }
}

}  // namespace spt_fast
