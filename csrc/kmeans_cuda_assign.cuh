// Labels and distances (eq. 9), or all squared distances, for any number of centres.
//
//   |x - c|^2 = |x - shift|^2 + base + slope * product        (kmeans_cuda_centers.cuh)
//
// A block of eight warps holds 256 tokens and goes through the centres in slabs of up to 104. A
// step takes 64 bytes of each row; steps go through a ring of 2 to 4 stages in shared memory. A
// warp keeps the products of its 32 tokens with all centres of a slab in registers, so that a value
// of a centre read from shared memory serves both row tiles of the warp. Tokens are read once for
// every slab: from the second slab on mostly from the L2 cache.
#pragma once

#include "kmeans_cuda_products.cuh"
#include "kmeans_cuda_tile.cuh"

namespace spt_fast {

constexpr int kAssignWarps = 8;
constexpr int kAssignThreads = kAssignWarps * kWarp;
constexpr int kRowTilesPerWarp = 2;
constexpr int kRowsPerWarp = kTileRows * kRowTilesPerWarp;
constexpr int kAssignRows = kAssignWarps * kRowsPerWarp;
// Bytes of a row that a step reads: two column tiles of half types, one of float32.
constexpr int kStepBytes = 64;
// K = 100 takes one slab, and 2 * 13 * 4 products leave 151 of 255 registers for the rest.
constexpr int kSlabTiles = 13;
constexpr int kMaxAssignStages = 4;  // as wait_for_oldest() knows them

__host__ __device__ constexpr int step_tiles(int element_bytes) {
  return kStepBytes / (kTileColumns * element_bytes);
}
// A stage holds the tokens of all warps, and after them the centres. Rows are padded by 16 bytes:
// the eight rows that ldmatrix reads at a time then lie in different banks.
constexpr int kAssignStride = kStepBytes + 16;
__host__ __device__ constexpr int assign_stage_bytes(int element_bytes) {
  return kAssignRows * kAssignStride + step_tiles(element_bytes) * kSlabTiles * kWarp * 16;
}

// How the centres are dealt with: slabs of equal size, except the last.
struct AssignShape {
  int stages;
  int slabs;
  int tiles_per_slab;
  int steps_per_slab;
};

// Counted up, which spares divisions.
struct Step {
  int slab = 0;
  int in_slab = 0;
  int stage = 0;

  __device__ void advance(const AssignShape& shape) {
    if (++stage == shape.stages) stage = 0;
    if (++in_slab == shape.steps_per_slab) {
      in_slab = 0;
      ++slab;
    }
  }
};

// Copies the centres of one step: target [kStepTiles, kSlabTiles, 32] uint4, of which
// `column_tiles` and `tiles` are written. The rest keeps what it had, and is not used.
template <int kStepTiles>
__device__ inline void copy_centers(unsigned char* target, const Problem& p, int64_t group,
                                    int first_column_tile, int column_tiles, int first_tile,
                                    int tiles) {
  const uint4* source =
      p.packed +
      ((group * p.column_tiles + first_column_tile) * p.center_tiles + first_tile) * kWarp;
#pragma unroll
  for (int b = 0; b < kStepTiles; ++b) {
#pragma unroll
    for (int first = 0; first < kSlabTiles * kWarp; first += kAssignThreads) {
      const int i = first + static_cast<int>(threadIdx.x);
      if (b < column_tiles && i < tiles * kWarp) {
        copy_async_16(target + (b * kSlabTiles * kWarp + i) * 16,
                      source + b * p.center_tiles * kWarp + i, 16);
      }
    }
  }
}

// Waits for the oldest copy of a ring of `stages`. The instruction takes only a constant.
__device__ inline void wait_for_oldest(int stages) {
  if (stages == 4) {
    wait_copies<2>();
  } else if (stages == 3) {
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
}

// What a thread knows of its rows: [r][half] is row quad_row() + 8 half of row tile r.
struct RowState {
  float norm[kRowTilesPerWarp][2];
  float best_score[kRowTilesPerWarp][2];
  int best_center[kRowTilesPerWarp][2];
};

__device__ inline int64_t thread_row(int64_t warp_row, int tile, int half) {
  return warp_row + tile * kTileRows + half * 8 + quad_row();
}

// score = base + slope * product, for the centres of a slab: the nearest is kept, and distances are
// written where all are wanted. INOUT product: result c[2 half + i] of row tile r and centre tile
// j; zero afterwards.
__device__ inline void finish_slab(const Problem& p, int64_t group, int64_t warp_row,
                                   int first_tile, int tiles,
                                   float (&product)[kRowTilesPerWarp][kSlabTiles][4],
                                   RowState& state) {
  const int64_t padded = int64_t{p.center_tiles} * kTileCenters;
#pragma unroll
  for (int j = 0; j < kSlabTiles; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (j >= tiles) continue;
      const int center = (first_tile + j) * kTileCenters + pair_column() + c;
      const float base = p.base[group * padded + center];
      const float slope = p.slope[group * padded + center];
#pragma unroll
      for (int r = 0; r < kRowTilesPerWarp; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float score = fmaf(slope, product[r][j][2 * half + c], base);
          product[r][j][2 * half + c] = 0.0f;
          if (score < state.best_score[r][half]) {
            state.best_score[r][half] = score;
            state.best_center[r][half] = center;
          }
          const int64_t row = thread_row(warp_row, r, half);
          if (p.all_distances && row < p.rows && center < p.num_centers) {
            const float distance = state.norm[r][half] + score;
            p.all_distances[(group * p.rows + row) * p.num_centers + center] =
                distance < 0.0f ? 0.0f : distance;
          }
        }
      }
    }
  }
}

// The nearest centre among those that the lanes of a quad have seen, to labels and distances.
__device__ inline void finish_rows(const Problem& p, int64_t group, int64_t warp_row,
                                   RowState& state) {
#pragma unroll
  for (int r = 0; r < kRowTilesPerWarp; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& best_score = state.best_score[r][half];
      int& best_center = state.best_center[r][half];
      share_nearest<kQuad>(best_score, best_center);
      const int64_t row = thread_row(warp_row, r, half);
      if (quad_lane() == 0 && row < p.rows) {
        store_nearest(p, group, row, finish_distance(state.norm[r][half], best_score, best_center));
      }
    }
  }
}

// product += rows * centres for the first `tiles` of a slab's centre tiles, kIsWhole: for all,
// without a branch between them. IN centers: this lane's words of centre tile j are centers[j *
// kWarp].
template <typename T, bool kIsWhole>
__device__ inline void multiply_slab(const uint4* centers, int tiles,
                                     const Rows<T> (&rows)[kRowTilesPerWarp],
                                     float (&product)[kRowTilesPerWarp][kSlabTiles][4]) {
#pragma unroll
  for (int j = 0; j < kSlabTiles; ++j) {
    if (kIsWhole || j < tiles) {
      const Centers<T> tile_centers(centers[j * kWarp]);
#pragma unroll
      for (int r = 0; r < kRowTilesPerWarp; ++r) tile_centers.multiply_add(product[r][j], rows[r]);
    }
  }
}

// label(x) = argmin_k |x - c_k|^2 (eq. 9), the lowest k of equal ones; or, where p.all_distances is
// set, every |x_m - c_k|^2 instead. IN tokens [G, M, D], packed, base, slope, shift [G, D]; OUT
// labels [G, M], distances [G, M], or all_distances [G, M, K]. grid = (ceil(M / kAssignRows),
// groups).
template <typename T>
__global__ void __launch_bounds__(kAssignThreads, 1) assign_kernel(Problem p, AssignShape shape) {
  constexpr int kElement = static_cast<int>(sizeof(T));
  constexpr int kStepTiles = step_tiles(kElement);
  constexpr int kStageBytes = assign_stage_bytes(kElement);
  constexpr int kTileBytes = kTileColumns * kElement;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t group = blockIdx.y;
  const int64_t warp_row = int64_t{blockIdx.x} * kAssignRows + warp * kRowsPerWarp;
  const T* tokens = group_tokens<T>(p, group);
  const float* shift = p.shift + group * p.tokens.width;

  // The shift of all columns lies behind the stages, zeros after its end.
  float* shared_shift = reinterpret_cast<float*>(dynamic_shared() + shape.stages * kStageBytes);
  for (int d = threadIdx.x; d < p.column_tiles * kTileColumns; d += kAssignThreads) {
    shared_shift[d] = d < p.tokens.width ? shift[d] : 0.0f;
  }

  const RowOffsets<kRowsPerWarp> offsets(p.tokens, warp_row, p.rows);
  const int rows = static_cast<int>(max(min(p.rows - warp_row, int64_t{kRowsPerWarp}), int64_t{0}));
  const auto copy_step = [&](const Step& step) {
    if (step.slab < shape.slabs) {
      const int first_column_tile = step.in_slab * kStepTiles;
      const int first_tile = step.slab * shape.tiles_per_slab;
      unsigned char* stage = dynamic_shared() + step.stage * kStageBytes;
      constexpr int kPieces = kStepBytes / 16;
      copy_rows<T, kRowsPerWarp, kPieces>(stage + warp * kRowsPerWarp * kAssignStride,
                                          kAssignStride, p, tokens, offsets, rows,
                                          first_column_tile * kTileColumns, kPieces);
      copy_centers<kStepTiles>(stage + kAssignRows * kAssignStride, p, group, first_column_tile,
                               p.column_tiles - first_column_tile, first_tile,
                               min(shape.tiles_per_slab, p.center_tiles - first_tile));
    }
    commit_copies();
  };
  Step next;
  for (; next.stage < shape.stages - 1; next.advance(shape)) copy_step(next);

  RowState state = {};
#pragma unroll
  for (int i = 0; i < 2 * kRowTilesPerWarp; ++i) state.best_score[i / 2][i % 2] = INFINITY;
  float product[kRowTilesPerWarp][kSlabTiles][4] = {};
  for (Step step; step.slab < shape.slabs; step.advance(shape)) {
    wait_for_oldest(shape.stages);
    __syncthreads();
    copy_step(next);
    next.advance(shape);

    const int first_tile = step.slab * shape.tiles_per_slab;
    const int tiles = min(shape.tiles_per_slab, p.center_tiles - first_tile);
    const unsigned char* stage = dynamic_shared() + step.stage * kStageBytes;
    const unsigned char* rows_begin = stage + warp * kRowsPerWarp * kAssignStride;
    const uint4* centers =
        reinterpret_cast<const uint4*>(stage + kAssignRows * kAssignStride) + lane;
#pragma unroll
    for (int b = 0; b < kStepTiles; ++b) {
      const int column_tile = step.in_slab * kStepTiles + b;
      if (column_tile < p.column_tiles) {
        Rows<T> values[kRowTilesPerWarp];
        const float* tile_shift = shared_shift + column_tile * kTileColumns;
#pragma unroll
        for (int r = 0; r < kRowTilesPerWarp; ++r) {
          values[r].load(rows_begin + r * kTileRows * kAssignStride + b * kTileBytes, kAssignStride,
                         tile_shift);
          // Norms are the same in every slab.
          if (step.slab == 0) values[r].add_norm(tile_shift, state.norm[r]);
        }
        if (tiles == kSlabTiles) {
          multiply_slab<T, true>(centers + b * kSlabTiles * kWarp, tiles, values, product);
        } else {
          multiply_slab<T, false>(centers + b * kSlabTiles * kWarp, tiles, values, product);
        }
      }
    }
    if (step.in_slab == shape.steps_per_slab - 1) {
#pragma unroll
      for (int i = 0; step.slab == 0 && i < 2 * kRowTilesPerWarp; ++i) {
        state.norm[i / 2][i % 2] = sum_over_quad(state.norm[i / 2][i % 2]);
      }
      finish_slab(p, group, warp_row, first_tile, tiles, product, state);
    }
  }
  if (!p.all_distances) finish_rows(p, group, warp_row, state);
}

}  // namespace spt_fast
