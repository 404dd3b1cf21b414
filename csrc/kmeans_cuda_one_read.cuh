// Assign and accumulate (eq. 9, 10) in one read of the tokens: up to 32 centres, up to 768 columns.
//
//   label(x) = argmin_k base_k + slope_k * product(x, k)      (kmeans_cuda_centers.cuh)
//   sums[k] = sum over x of [label(x) = k] x                  a product of zeros and ones with x
//
// A block of eight warps goes through a run of tokens, a tile of 16 or 32 at a time, with two tiles
// in shared memory. Each warp has an eighth of the columns: it copies them; it multiplies them with
// the centres, which stay in shared memory; and once the labels are known it adds them to sums in
// its registers. In between, the warps' shares of the products meet in shared memory, and 8 or 16
// threads choose a token's centre. A warp copies for itself alone, so two barriers a tile suffice.
//
// The arithmetic (bytes, operations, shared memory, registers, time) is in
// docs/design/kmeans-cuda.md. Limits: no weights; K <= 32; the shared memory of the GPU
// (one_read_shape says whether it fits).
#pragma once

#include "kmeans_cuda_products.cuh"
#include "kmeans_cuda_tile.cuh"

namespace spt_fast {

constexpr int kOneReadWarps = 8;
constexpr int kOneReadThreads = kOneReadWarps * kWarp;
constexpr int kOneReadCenters = 32;
// Sums of 1024 columns spill registers on sm_100 and sm_120.
constexpr int64_t kOneReadColumns = 768;
constexpr int kSumTiles = kOneReadCenters / kTileRows;  // a sum has a centre for each of its rows
constexpr int kOneReadStages = 2;
// Tensor cores cut off what does not fit float32: an addition loses up to 2^-23 of the sum. Sums
// move to float64 after 128 additions, which keeps the loss under 1e-5: 16 tokens take one addition
// of half types, and four of float32. Tests define fewer.
#ifndef SPT_ADDITIONS_PER_FLUSH
#define SPT_ADDITIONS_PER_FLUSH 128
#endif
__host__ __device__ constexpr int tokens_per_flush(int element_bytes) {
  return SPT_ADDITIONS_PER_FLUSH * kTileRows / (element_bytes == 4 ? 4 : 1);
}

// Where things are in the block's shared memory.
struct OneReadShape {
  int column_tiles_per_warp;
  int stride;          // bytes from row to row of a tile
  int product_stride;  // floats from row to row of the products
  int centers;         // from here on offsets in bytes; the tiles come first
  int shift;
  int base;
  int slope;
  int products;
  int norms;
  int labels;
  int bytes;
};

inline OneReadShape one_read_shape(int64_t width, int center_tiles, int element_bytes,
                                   int row_tiles) {
  const int column_tiles = static_cast<int>(ceil_div(width, kTileColumns));
  const int rows = kTileRows * row_tiles;
  OneReadShape shape{};
  shape.column_tiles_per_warp = static_cast<int>(ceil_div(column_tiles, kOneReadWarps));
  // An odd multiple of 16 bytes: the eight rows that ldmatrix reads at a time lie in different
  // banks.
  shape.stride = column_tiles * kTileColumns * element_bytes + 16;
  // 8 or 24 modulo 32 words: so do the pairs of products that a warp stores at a time.
  shape.product_stride = center_tiles * kTileCenters + (center_tiles % 2 ? 0 : kTileCenters);
  int next = kOneReadStages * rows * shape.stride;
  const auto take = [&next](int bytes) {
    const int offset = next;
    next += static_cast<int>(ceil_div(bytes, 16)) * 16;
    return offset;
  };
  const int floats = static_cast<int>(sizeof(float));
  shape.centers = take(column_tiles * center_tiles * kWarp * 16);
  shape.shift = take(column_tiles * kTileColumns * floats);
  shape.base = take(center_tiles * kTileCenters * floats);
  shape.slope = take(center_tiles * kTileCenters * floats);
  shape.products = take(kOneReadWarps * rows * shape.product_stride * floats);
  shape.norms = take(kOneReadWarps * rows * floats);
  shape.labels = take(rows * static_cast<int>(sizeof(int16_t)));
  shape.bytes = next;
  return shape;
}

// Copies the group's centres, shift and constants to shared memory, for the whole run.
__device__ inline void load_centers(const Problem& p, const OneReadShape& shape, int64_t group) {
  const int padded = p.center_tiles * kTileCenters;
  const int packed = p.column_tiles * p.center_tiles * kWarp;
  for (int i = threadIdx.x; i < packed; i += kOneReadThreads) {
    shared_at<uint4>(shape.centers)[i] = p.packed[group * packed + i];
  }
  for (int d = threadIdx.x; d < p.column_tiles * kTileColumns; d += kOneReadThreads) {
    shared_at<float>(shape.shift)[d] =
        d < p.tokens.width ? p.shift[group * p.tokens.width + d] : 0.0f;
  }
  for (int k = threadIdx.x; k < padded; k += kOneReadThreads) {
    shared_at<float>(shape.base)[k] = p.base[group * padded + k];
    shared_at<float>(shape.slope)[k] = p.slope[group * padded + k];
  }
}

// This warp's share of the products and norms of a tile, from its columns, which begin at `tile`.
// kIsWhole: it has all kColumnTiles, whose addresses are then constants apart, and no branch keeps
// the loads of one from overlapping the products of another. OUT products [8 warps, tokens,
// product_stride], norms [8 warps, tokens], in shared memory.
template <typename T, int kRowTiles, int kColumnTiles, int kTiles, bool kIsWhole>
__device__ inline void multiply_tile(const OneReadShape& shape, const unsigned char* tile,
                                     int first_column_tile, int num_column_tiles) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const uint4* centers =
      shared_at<uint4>(shape.centers) + first_column_tile * kTiles * kWarp + lane;
  const float* shift = shared_at<float>(shape.shift) + first_column_tile * kTileColumns;
  const int tiles = kIsWhole ? kColumnTiles : num_column_tiles;
  float product[kRowTiles][kTiles][4] = {};
  float norm[kRowTiles][2] = {};

#pragma unroll(kIsWhole ? kColumnTiles : 1)
  for (int b = 0; b < tiles; ++b) {
    Rows<T> rows[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      rows[r].load(
          tile + r * kTileRows * shape.stride + b * kTileColumns * static_cast<int>(sizeof(T)),
          shape.stride, shift + b * kTileColumns);
      rows[r].add_norm(shift + b * kTileColumns, norm[r]);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const Centers<T> tile_centers(centers[(b * kTiles + j) * kWarp]);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) tile_centers.multiply_add(product[r][j], rows[r]);
    }
  }

  const int first_row = warp * kRowTiles * kTileRows + quad_row();
  float* products = shared_at<float>(shape.products);
  float* norms = shared_at<float>(shape.norms);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + r * kTileRows + half * 8;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        *reinterpret_cast<float2*>(products + row * shape.product_stride + j * kTileCenters +
                                   pair_column()) = {product[r][j][2 * half],
                                                     product[r][j][2 * half + 1]};
      }
      const float sum = sum_over_quad(norm[r][half]);
      if (quad_lane() == 0) norms[row] = sum;
    }
  }
}

// Adds up the warps' shares, in order, and chooses each token's centre. Lane map: 256 / kTokens
// neighbouring threads hold a token, and the first of them speaks for it. OUT labels [kTokens] in
// shared memory, -1 outside the run; labels and distances of the problem. Returns the squared
// distance of the token for which this thread speaks, else zero.
template <int kTokens, int kTiles>
__device__ inline float choose_centers(const Problem& p, const OneReadShape& shape, int64_t group,
                                       int64_t first_row, int64_t end) {
  constexpr int kLanes = kOneReadThreads / kTokens;
  const int row = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const float* products = shared_at<float>(shape.products) + row * shape.product_stride;
  const float* norms = shared_at<float>(shape.norms) + row;
  const float* base = shared_at<float>(shape.base);
  const float* slope = shared_at<float>(shape.slope);

  float best_score = INFINITY;
  int best_center = 0;
#pragma unroll
  for (int k = lane; k < kTiles * kTileCenters; k += kLanes) {
    float product = 0.0f;
#pragma unroll
    for (int w = 0; w < kOneReadWarps; ++w) {
      product += products[w * kTokens * shape.product_stride + k];
    }
    const float score = fmaf(slope[k], product, base[k]);
    if (score < best_score) {
      best_score = score;
      best_center = k;
    }
  }
  share_nearest<kLanes>(best_score, best_center);
  if (lane != 0) return 0.0f;

  float norm = 0.0f;
#pragma unroll
  for (int w = 0; w < kOneReadWarps; ++w) norm += norms[w * kTokens];
  const bool inside = first_row + row < end;
  const Nearest nearest = finish_distance(norm, best_score, best_center);
  shared_at<int16_t>(shape.labels)[row] = static_cast<int16_t>(inside ? nearest.center : -1);
  if (!inside) return 0.0f;
  store_nearest(p, group, first_row + row, nearest);
  return nearest.distance;
}

// Sums of a warp's columns. values[c][b][t][i] is result c[i] of the product of centres 16 c and on
// with the columns 8 t and on of column tile b.
template <int kColumnTiles>
struct Sums {
  float values[kSumTiles][kColumnTiles][2][4];
};

// sums += membership * tile, for this warp's columns; as in multiply_tile.
template <typename T, int kRowTiles, int kColumnTiles, bool kIsWhole>
__device__ inline void accumulate_tile(const OneReadShape& shape, const unsigned char* tile,
                                       int num_column_tiles, Sums<kColumnTiles>& sums) {
  const int16_t* labels = shared_at<int16_t>(shape.labels);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    Membership<T> membership[kSumTiles];
#pragma unroll
    for (int c = 0; c < kSumTiles; ++c) membership[c].set(labels + kTileRows * r, kTileRows * c);
#pragma unroll
    for (int b = 0; b < kColumnTiles; ++b) {
      if (kIsWhole || b < num_column_tiles) {
        Summands<T> summands;
        summands.load(
            tile + r * kTileRows * shape.stride + b * kTileColumns * static_cast<int>(sizeof(T)),
            shape.stride);
#pragma unroll
        for (int c = 0; c < kSumTiles; ++c) {
          summands.template add<0>(sums.values[c][b][0], membership[c]);
          summands.template add<1>(sums.values[c][b][1], membership[c]);
        }
      }
    }
  }
}

// How many of the warp's 32 labels, one in each lane, are k: in lane k. Labels below 0 count for
// none.
__device__ inline int count_members(int label) {
  const unsigned lane = threadIdx.x % kWarp;
  unsigned members = __ballot_sync(kAllLanes, label >= 0);
#pragma unroll
  for (int bit = 0; bit < 5; ++bit) {
    const unsigned set = __ballot_sync(kAllLanes, label >> bit & 1);
    members &= lane >> bit & 1 ? set : ~set;
  }
  return __popc(members);
}

// Adds the sums to the run's partials [K, D + kExtraColumns], in float64, and clears them. A thread
// reads kBatch totals before it writes one, and waits for memory once for all of them; with more,
// sm_100 spills.
template <int kColumnTiles>
__device__ inline void flush_sums(const Problem& p, double* partial, int first_column_tile,
                                  int num_column_tiles, bool first, Sums<kColumnTiles>& sums) {
  constexpr int kBatchTiles = 2;
  constexpr int kBatch = 4 * kBatchTiles;
  static_assert(kColumnTiles % kBatchTiles == 0);
  const int64_t stride = p.tokens.width + kExtraColumns;
  const int first_column = first_column_tile * kTileColumns + pair_column();
  const int columns =
      min(num_column_tiles * kTileColumns, static_cast<int>(p.tokens.width) - first_column);
#pragma unroll
  for (int c = 0; c < kSumTiles; ++c) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int center = kTileRows * c + quad_row() + half * 8;
      double* row = partial + center * stride + first_column;
      const int end = center < p.num_centers ? columns : 0;
#pragma unroll
      for (int b = 0; b < kColumnTiles; b += kBatchTiles) {
        double totals[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int column = (b + i / 4) * kTileColumns + i / 2 % 2 * 8 + i % 2;
          totals[i] = !first && column < end ? row[column] : 0.0;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int column = (b + i / 4) * kTileColumns + i / 2 % 2 * 8 + i % 2;
          float& sum = sums.values[c][b + i / 4][i / 2 % 2][2 * half + i % 2];
          if (column < end) row[column] = totals[i] + sum;
          sum = 0.0f;
        }
      }
    }
  }
}

// Labels, distances, and the sums, counts and inertia of each run (eq. 9, 10). IN tokens [G, M, D],
// packed, base, slope, shift [G, D]; OUT partials [G, runs, K, D + kExtraColumns], labels [G, M]
// and distances [G, M], or null. grid = (runs, groups).
template <typename T, int kRowTiles, int kColumnTiles, int kTiles>
__global__ void __launch_bounds__(kOneReadThreads, 1)
    one_read_kernel(Problem p, OneReadShape shape) {
  constexpr int kTokens = kTileRows * kRowTiles;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t group = blockIdx.y;
  const int64_t run_rows = ceil_div(p.rows, p.runs);
  const int64_t begin = min(blockIdx.x * run_rows, p.rows);
  const int64_t end = min(begin + run_rows, p.rows);
  const int first_column_tile = min(warp * shape.column_tiles_per_warp, p.column_tiles);
  const int num_column_tiles = min(shape.column_tiles_per_warp, p.column_tiles - first_column_tile);
  double* partial = run_partial(p, group, blockIdx.x);

  const T* tokens = group_tokens<T>(p, group);
  unsigned char* tiles =
      dynamic_shared() + first_column_tile * kTileColumns * static_cast<int>(sizeof(T));
  const auto copy_tile = [&](int64_t first_row, int stage) {
    if (first_row < end) {
      constexpr int kPieces = kTileColumns * static_cast<int>(sizeof(T)) / 16;
      copy_rows<T, kTokens, kColumnTiles * kPieces>(
          tiles + stage * kTokens * shape.stride, shape.stride, p, tokens,
          RowOffsets<kTokens>(p.tokens, first_row, end),
          static_cast<int>(min(end - first_row, int64_t{kTokens})),
          first_column_tile * kTileColumns, num_column_tiles * kPieces);
    }
    commit_copies();
  };
  for (int stage = 0; stage < kOneReadStages; ++stage) {
    copy_tile(begin + stage * kTokens, stage);
  }
  load_centers(p, shape, group);
  __syncthreads();

  const bool is_whole = num_column_tiles == kColumnTiles;
  Sums<kColumnTiles> sums = {};
  double inertia = 0.0;
  int64_t count = 0;
  int stage = 0;
  int unflushed = 0;
  bool first_flush = true;
  for (int64_t row = begin; row < end; row += kTokens) {
    wait_copies<kOneReadStages - 1>();
    __syncwarp();
    const unsigned char* tile = tiles + stage * kTokens * shape.stride;
    if (is_whole) {
      multiply_tile<T, kRowTiles, kColumnTiles, kTiles, true>(shape, tile, first_column_tile,
                                                              num_column_tiles);
    } else {
      multiply_tile<T, kRowTiles, kColumnTiles, kTiles, false>(shape, tile, first_column_tile,
                                                               num_column_tiles);
    }
    __syncthreads();
    inertia += choose_centers<kTokens, kTiles>(p, shape, group, row, end);
    __syncthreads();
    if (is_whole) {
      accumulate_tile<T, kRowTiles, kColumnTiles, true>(shape, tile, num_column_tiles, sums);
    } else {
      accumulate_tile<T, kRowTiles, kColumnTiles, false>(shape, tile, num_column_tiles, sums);
    }
    if (warp == kOneReadWarps - 1) {
      count += count_members(lane < kTokens ? shared_at<int16_t>(shape.labels)[lane] : -1);
    }
    __syncwarp();
    copy_tile(row + kOneReadStages * kTokens, stage);
    stage ^= 1;
    unflushed += kTokens;
    if (unflushed == tokens_per_flush(sizeof(T))) {
      flush_sums(p, partial, first_column_tile, num_column_tiles, first_flush, sums);
      first_flush = false;
      unflushed = 0;
    }
  }
  if (unflushed || first_flush) {
    flush_sums(p, partial, first_column_tile, num_column_tiles, first_flush, sums);
  }

  const int64_t columns = p.tokens.width + kExtraColumns;
  if (warp == kOneReadWarps - 1 && lane < p.num_centers) {
    partial[lane * columns + p.tokens.width] = static_cast<double>(count);
  }
  // The inertia of the threads that spoke for tokens, in their order. The products are free: every
  // thread has passed the second barrier of the last tile.
  double* shares = shared_at<double>(shape.products);
  constexpr int kLanes = kOneReadThreads / kTokens;
  if (threadIdx.x % kLanes == 0) shares[threadIdx.x / kLanes] = inertia;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int i = 0; i < kTokens; ++i) total += shares[i];
    partial[p.tokens.width + 1] = total;
  }
}

}  // namespace spt_fast
