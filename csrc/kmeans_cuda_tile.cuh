// Copies rows of tokens to shared memory: asynchronously, 16 bytes at a time, each warp its own.
//
// Rows whose addresses are not multiples of 16 bytes are loaded element by element. What lies
// outside the tokens arrives as zeros.
#pragma once

#include "kmeans_cuda_problem.cuh"

namespace spt_fast {

constexpr int kCopyLanes = 4;  // neighbouring lanes that copy 64 adjacent bytes of a row

// 16 bytes from `source` to `target`, of which the first `left` elements exist (none if negative).
template <typename T>
__device__ inline void copy_piece(unsigned char* target, const T* source, int left,
                                  bool is_aligned) {
  constexpr int kElements = 16 / sizeof(T);
  const int count = min(max(left, 0), kElements);
  if (is_aligned) {
    copy_async_16(target, source, count * static_cast<int>(sizeof(T)));
  } else {
    alignas(16) T values[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) values[e] = e < count ? source[e] : T{};
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(values);
  }
}

// Where the rows begin of which a lane copies pieces, in elements: rows lane / 4 + 8 i from
// `first_row` on; beyond `end` that of the last row.
template <int kRows>
struct RowOffsets {
  static constexpr int kStep = kWarp / kCopyLanes;
  int64_t at[kRows / kStep];

  __device__ RowOffsets(const TokenView& tokens, int64_t first_row, int64_t end) {
    const int lane = threadIdx.x % kWarp;
    const int64_t own = token_offset(tokens, min(first_row + lane % kRows, end - 1));
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      at[i] = __shfl_sync(kAllLanes, own, i * kStep + lane / kCopyLanes);
    }
  }
};

// Columns [first_column, first_column + pieces * 16 bytes) of the first `rows` of kRows <= 32 rows,
// the others as zeros, to target, target + stride, ... One warp; nothing is awaited. kPieces: the
// number of pieces for which no loop is needed.
template <typename T, int kRows, int kPieces>
__device__ inline void copy_rows(unsigned char* target, int stride, const Problem& p,
                                 const T* tokens, const RowOffsets<kRows>& offsets, int rows,
                                 int first_column, int pieces) {
  constexpr int kStep = RowOffsets<kRows>::kStep;
  constexpr int kElements = 16 / sizeof(T);
  static_assert(kPieces % kCopyLanes == 0);
  const int lane = threadIdx.x % kWarp;
  const int columns = static_cast<int>(p.tokens.width) - first_column;
  const bool is_whole = p.is_aligned && rows >= kRows && pieces * kElements <= columns;
  target += lane / kCopyLanes * stride + lane % kCopyLanes * 16;
  tokens += first_column + lane % kCopyLanes * kElements;
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const T* source = tokens + offsets.at[i];
    unsigned char* next = target + i * kStep * stride;
    if (is_whole && pieces == kPieces) {
#pragma unroll
      for (int piece = 0; piece < kPieces; piece += kCopyLanes) {
        copy_async_16(next + piece * 16, source + piece * kElements, 16);
      }
    } else {
      const int inside = i * kStep + lane / kCopyLanes < rows ? columns : 0;
      for (int piece = 0; piece + lane % kCopyLanes < pieces; piece += kCopyLanes) {
        const int left = inside - (piece + lane % kCopyLanes) * kElements;
        if (is_whole) {
          copy_async_16(next + piece * 16, source + piece * kElements, 16);
        } else {
          copy_piece(next + piece * 16, source + piece * kElements, left, p.is_aligned);
        }
      }
    }
  }
}

}  // namespace spt_fast
