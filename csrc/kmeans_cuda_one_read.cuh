// Assign and accumulate in one read of the tokens: up to 32 centres of up to 768 columns.
//
// A block of eight warps goes through a run of tokens, a tile of 16 or 32 at a time, two tiles in
// shared memory. Each warp owns an eighth of the columns: it copies them, multiplies them with the
// centres' (which stay in shared memory), and, once the labels are known, adds them up into sums
// that stay in its registers, as ones and zeros times the tile. Between the two, the eight shares
// of a product meet in shared memory, where 8 or 16 threads choose a token's centre. So the rows
// move warp by warp, and two barriers a tile suffice.
//
// The arithmetic (bytes, operations, shared memory, registers, time) is in docs/design/kmeans-cuda.md.
// Limits: no weights; K <= 32; the shared memory of the GPU (one_read_shape says whether it fits).
#pragma once

#include "kmeans_cuda_products.cuh"
#include "kmeans_cuda_tile.cuh"

namespace spt_fast {

constexpr int kOneReadWarps = 8;
constexpr int kOneReadThreads = kOneReadWarps * kWarp;
constexpr int kOneReadCenters = 32;
// Sums of 1024 columns spill registers on sm_100 and sm_120.
constexpr int64_t kOneReadColumns = 768;
constexpr int kSumTiles = kOneReadCenters / 16;
constexpr int kOneReadStages = 2;
// Tensor cores cut off what does not fit float32: an add loses up to 2^-23 of the sum. Sums move to
// float64 after 128 such adds, which keeps the loss under 1e-5: float32 takes four adds to 16
// tokens, half types take one.
constexpr int kTokensPerFlush = 2048;
__host__ __device__ constexpr int tokens_per_flush(int element_bytes) {
  return element_bytes == 4 ? kTokensPerFlush / 4 : kTokensPerFlush;
}

// Where things are in the block's shared memory.
struct OneReadShape {
  int blocks_per_warp;  // 16-column blocks of a warp
  int stride;           // bytes from row to row of a tile
  int product_stride;   // floats from row to row of the products
  int centers;          // offsets in bytes, from here on; the tiles come first
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
  const int column_blocks = static_cast<int>(ceil_div(width, kBlockColumns));
  const int rows = 16 * row_tiles;
  OneReadShape shape{};
  shape.blocks_per_warp = static_cast<int>(ceil_div(column_blocks, kOneReadWarps));
  // An odd number of 16 bytes: ldmatrix then meets no bank twice.
  shape.stride = column_blocks * kBlockColumns * element_bytes + 16;
  // 8 or 24 modulo 32 words: neither do the pairs of products.
  shape.product_stride = center_tiles * kTileCenters + (center_tiles % 2 ? 0 : kTileCenters);
  int next = kOneReadStages * rows * shape.stride;
  const auto take = [&next](int bytes) {
    const int offset = next;
    next += static_cast<int>(ceil_div(bytes, 16)) * 16;
    return offset;
  };
  const int floats = static_cast<int>(sizeof(float));
  shape.centers = take(column_blocks * center_tiles * kWarp * 16);
  shape.shift = take(column_blocks * kBlockColumns * floats);
  shape.base = take(center_tiles * kTileCenters * floats);
  shape.slope = take(center_tiles * kTileCenters * floats);
  shape.products = take(kOneReadWarps * rows * shape.product_stride * floats);
  shape.norms = take(kOneReadWarps * rows * floats);
  shape.labels = take(rows * static_cast<int>(sizeof(int)));
  shape.bytes = next;
  return shape;
}

// The group's centres, shift and constants, for the whole run.
__device__ inline void load_centers(const Problem& p, const OneReadShape& shape, int64_t group) {
  const int padded = p.center_tiles * kTileCenters;
  const int packed = p.column_blocks * p.center_tiles * kWarp;
  for (int i = threadIdx.x; i < packed; i += kOneReadThreads) {
    shared_at<uint4>(shape.centers)[i] = p.packed[group * packed + i];
  }
  for (int d = threadIdx.x; d < p.column_blocks * kBlockColumns; d += kOneReadThreads) {
    shared_at<float>(shape.shift)[d] =
        d < p.tokens.width ? p.shift[group * p.tokens.width + d] : 0.0f;
  }
  for (int k = threadIdx.x; k < padded; k += kOneReadThreads) {
    shared_at<float>(shape.base)[k] = p.base[group * padded + k];
    shared_at<float>(shape.slope)[k] = p.slope[group * padded + k];
  }
}

// This warp's share of the products and norms of a tile, from its columns, to shared memory.
template <typename T, int kRowTiles, int kTiles>
__device__ inline void multiply_tile(const OneReadShape& shape, const unsigned char* tile,
                                     int first_block, int num_blocks) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const uint4* centers = shared_at<uint4>(shape.centers) + lane;
  const float* shift = shared_at<float>(shape.shift);
  float product[kRowTiles][kTiles][4] = {};
  float norm[kRowTiles][2] = {};

#pragma unroll 2
  for (int b = first_block; b < first_block + num_blocks; ++b) {
    Rows<T> rows[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      rows[r].load(tile + r * 16 * shape.stride + b * kBlockColumns * static_cast<int>(sizeof(T)),
                   shape.stride, shift + b * kBlockColumns, norm[r]);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const Centers<T> part(centers[(b * kTiles + j) * kWarp]);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) part.multiply_add(product[r][j], rows[r]);
    }
  }

  const int first_row = warp * kRowTiles * 16 + lane / 4;
  float* products = shared_at<float>(shape.products);
  float* norms = shared_at<float>(shape.norms);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + r * 16 + half * 8;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        *reinterpret_cast<float2*>(products + row * shape.product_stride + j * kTileCenters +
                                   2 * (lane % 4)) = {product[r][j][2 * half],
                                                      product[r][j][2 * half + 1]};
      }
      float sum = norm[r][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane % 4 == 0) norms[row] = sum;
    }
  }
}

// Adds the warps' shares up, in order, and chooses each token's centre. Returns the distance of
// the token if this thread speaks for one, else zero; labels outside the run are -1.
template <int kTileRows, int kTiles>
__device__ inline float choose_centers(const Problem& p, const OneReadShape& shape, int64_t group,
                                       int64_t first_row, int64_t end) {
  constexpr int kLanes = kOneReadThreads / kTileRows;
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
      product += products[w * kTileRows * shape.product_stride + k];
    }
    const float score = fmaf(slope[k], product, base[k]);
    if (score < best_score) {
      best_score = score;
      best_center = k;
    }
  }
#pragma unroll
  for (int other = kLanes / 2; other > 0; other /= 2) {
    const float score = __shfl_xor_sync(0xffffffffu, best_score, other);
    const int center = __shfl_xor_sync(0xffffffffu, best_center, other);
    if (is_nearer(score, center, best_score, best_center)) {
      best_score = score;
      best_center = center;
    }
  }
  if (lane != 0) return 0.0f;

  float norm = 0.0f;
#pragma unroll
  for (int w = 0; w < kOneReadWarps; ++w) norm += norms[w * kTileRows];
  const bool inside = first_row + row < end;
  const Nearest nearest = finish_distance(norm, best_score, best_center);
  shared_at<int>(shape.labels)[row] = inside ? nearest.center : -1;
  if (!inside) return 0.0f;
  store_nearest(p, group, first_row + row, nearest);
  return nearest.distance;
}

// Sums of a warp's columns: row c of tile t is centre 16 t + c; a column block is two tiles of 8.
template <int kBlocks>
struct Sums {
  float values[kSumTiles][kBlocks][2][4];
};

// sums += membership * tile, for this warp's columns. kIsWhole: all kBlocks are there, and no
// branch keeps the loads of one from overlapping the products of another.
template <typename T, int kRowTiles, int kBlocks, bool kIsWhole>
__device__ inline void accumulate_tile(const OneReadShape& shape, const unsigned char* tile,
                                       int first_block, int num_blocks, Sums<kBlocks>& sums) {
  const int* labels = shared_at<int>(shape.labels);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    Membership<T> membership[kSumTiles];
#pragma unroll
    for (int c = 0; c < kSumTiles; ++c) membership[c].set(labels + 16 * r, 16 * c);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (kIsWhole || b < num_blocks) {
        Summands<T> summands;
        summands.load(tile + r * 16 * shape.stride +
                          (first_block + b) * kBlockColumns * static_cast<int>(sizeof(T)),
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

// Lane k counts the tokens of centre k among 32 labels, one in each lane.
__device__ inline int count_members(int label) {
  const unsigned lane = threadIdx.x % kWarp;
  unsigned members = __ballot_sync(0xffffffffu, label >= 0);
#pragma unroll
  for (int bit = 0; bit < 5; ++bit) {
    const unsigned set = __ballot_sync(0xffffffffu, label >> bit & 1);
    members &= lane >> bit & 1 ? set : ~set;
  }
  return __popc(members);
}

// Moves the sums to the run's float64 partials and clears them.
template <int kBlocks>
__device__ inline void flush_sums(const Problem& p, double* partial, int first_block,
                                  int num_blocks, bool first, Sums<kBlocks>& sums) {
  const int lane = threadIdx.x % kWarp;
  const int64_t columns = p.tokens.width + kExtraColumns;
#pragma unroll
  for (int c = 0; c < kSumTiles; ++c) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int64_t center = 16 * c + lane / 4 + i / 2 % 2 * 8;
        const int64_t column =
            int64_t{first_block + b} * kBlockColumns + i / 4 * 8 + 2 * (lane % 4) + i % 2;
        float& sum = sums.values[c][b][i / 4][i % 4];
        if (b < num_blocks && center < p.num_centers && column < p.tokens.width) {
          double& total = partial[center * columns + column];
          total = first ? sum : total + sum;
        }
        sum = 0.0f;
      }
    }
  }
}

// One block per run and group: grid = (runs, groups).
template <typename T, int kRowTiles, int kBlocks, int kTiles>
__global__ void __launch_bounds__(kOneReadThreads, 1)
    one_read_kernel(Problem p, OneReadShape shape) {
  constexpr int kTileRows = 16 * kRowTiles;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t group = blockIdx.y;
  const RowList rows = rows_of(p, group);
  const int64_t run_rows = ceil_div(rows.count, p.runs);
  const int64_t begin = min(blockIdx.x * run_rows, rows.count);
  const int64_t end = min(begin + run_rows, rows.count);
  const int first_block = min(warp * shape.blocks_per_warp, p.column_blocks);
  const int num_blocks = min(shape.blocks_per_warp, p.column_blocks - first_block);
  double* partial = run_partial(p, group, blockIdx.x);

  const T* tokens = group_tokens<T>(p, group);
  unsigned char* tiles = dynamic_shared();
  const auto copy_tile = [&](int64_t first_row, int stage) {
    if (first_row < end) {
      constexpr int kPieces = kBlockColumns * static_cast<int>(sizeof(T)) / 16;
      const int first_column = first_block * kBlockColumns;
      copy_rows<T, kTileRows>(
          tiles + stage * kTileRows * shape.stride + first_column * static_cast<int>(sizeof(T)),
          shape.stride, p, tokens, rows, first_row, end, first_column, num_blocks * kPieces);
    }
    commit_copies();
  };
  for (int stage = 0; stage < kOneReadStages; ++stage) {
    copy_tile(begin + stage * kTileRows, stage);
  }
  load_centers(p, shape, group);
  __syncthreads();

  Sums<kBlocks> sums = {};
  double inertia = 0.0;
  int64_t count = 0;
  int stage = 0;
  int unflushed = 0;
  bool first_flush = true;
  for (int64_t row = begin; row < end; row += kTileRows) {
    wait_copies<kOneReadStages - 1>();
    __syncwarp();
    const unsigned char* tile = tiles + stage * kTileRows * shape.stride;
    multiply_tile<T, kRowTiles, kTiles>(shape, tile, first_block, num_blocks);
    __syncthreads();
    inertia += choose_centers<kTileRows, kTiles>(p, shape, group, row, end);
    __syncthreads();
    if (num_blocks == kBlocks) {
      accumulate_tile<T, kRowTiles, kBlocks, true>(shape, tile, first_block, num_blocks, sums);
    } else {
      accumulate_tile<T, kRowTiles, kBlocks, false>(shape, tile, first_block, num_blocks, sums);
    }
    if (warp == kOneReadWarps - 1) {
      count += count_members(lane < kTileRows ? shared_at<int>(shape.labels)[lane] : -1);
    }
    __syncwarp();
    copy_tile(row + kOneReadStages * kTileRows, stage);
    stage ^= 1;
    unflushed += kTileRows;
    if (unflushed == tokens_per_flush(sizeof(T))) {
      flush_sums(p, partial, first_block, num_blocks, first_flush, sums);
      first_flush = false;
      unflushed = 0;
    }
  }
  if (unflushed || first_flush) {
    flush_sums(p, partial, first_block, num_blocks, first_flush, sums);
  }

  const int64_t columns = p.tokens.width + kExtraColumns;
  if (warp == kOneReadWarps - 1 && lane < p.num_centers) {
    partial[lane * columns + p.tokens.width] = static_cast<double>(count);
  }
  // Every thread that spoke for a token adds its share, in the order of the threads. The barrier
  // of the last tile has freed the products.
  double* shares = shared_at<double>(shape.products);
  constexpr int kLanes = kOneReadThreads / kTileRows;
  if (threadIdx.x % kLanes == 0) shares[threadIdx.x / kLanes] = inertia;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int i = 0; i < kTileRows; ++i) total += shares[i];
    partial[p.tokens.width + 1] = total;
  }
}

}  // namespace spt_fast
