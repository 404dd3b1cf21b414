// Labels and distances, or all squared distances, for any number of centres: a tiled product.
//
// A block of eight warps holds 256 tokens and goes through the centres in chunks of up to 104, 64
// bytes of the columns a step, the steps in a ring of 2 to 4 stages in shared memory. A warp keeps
// the products of its 32 tokens with all centres of a chunk in registers, so a centre read from
// shared memory serves four products. Tokens are read once for every chunk, by then mostly from the
// L2 cache.
#pragma once

#include "kmeans_cuda_products.cuh"
#include "kmeans_cuda_tile.cuh"

namespace spt_fast {

constexpr int kAssignWarps = 8;
constexpr int kAssignThreads = kAssignWarps * kWarp;
constexpr int kRowTilesPerWarp = 2;
constexpr int kRowsPerWarp = 16 * kRowTilesPerWarp;
constexpr int kAssignRows = kAssignWarps * kRowsPerWarp;
// Bytes of a row that a step reads: two blocks of columns, of float32 one.
constexpr int kStepBytes = 64;
// Centres of a chunk: 100 take one, and the products leave registers for the rest.
constexpr int kChunkTiles = 13;
constexpr int kMaxAssignStages = 4;

__host__ __device__ constexpr int step_blocks(int element_bytes) {
  return kStepBytes / (kBlockColumns * element_bytes);
}
// A stage holds the tokens of all warps, rows padded by 16 bytes against bank conflicts, and after
// them the centres.
constexpr int kAssignStride = kStepBytes + 16;
__host__ __device__ constexpr int assign_stage_bytes(int element_bytes) {
  return kAssignRows * kAssignStride + step_blocks(element_bytes) * kChunkTiles * kWarp * 16;
}

// How the centres are dealt out: chunks of equal size, but for the last.
struct AssignShape {
  int stages;
  int chunks;
  int tiles_per_chunk;
  int steps_per_chunk;
};

// Copies the centres of one step; what lies outside them stays as it was, and is not used.
__device__ inline void copy_centers(unsigned char* target, const Problem& p, int64_t group,
                                    int first_block, int blocks, int first_tile, int tiles) {
  const int pieces = tiles * kWarp;
  for (int b = 0; b < blocks; ++b) {
    const uint4* source =
        p.packed +
        ((group * p.column_blocks + first_block + b) * p.center_tiles + first_tile) * kWarp;
    for (int i = threadIdx.x; i < pieces; i += kAssignThreads) {
      copy_async_16(target + (b * kChunkTiles * kWarp + i) * 16, source + i, 16);
    }
  }
}

// Waits for the oldest copy of a ring of `stages`; the instruction wants a constant.
__device__ inline void wait_for_oldest(int stages) {
  if (stages == 4) {
    wait_copies<2>();
  } else if (stages == 3) {
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
}

// A thread's rows: lane / 4 of each half of each row tile.
struct RowState {
  float norm[kRowTilesPerWarp][2];
  float best_score[kRowTilesPerWarp][2];
  int best_center[kRowTilesPerWarp][2];
};

__device__ inline int64_t thread_row(int64_t warp_row, int tile, int half) {
  return warp_row + tile * 16 + half * 8 + threadIdx.x % kWarp / 4;
}

// Products to scores: kept if nearest, or written as distances.
__device__ inline void finish_chunk(const Problem& p, int64_t group, int64_t warp_row,
                                    int first_tile, int tiles,
                                    const float (&product)[kRowTilesPerWarp][kChunkTiles][4],
                                    RowState& state) {
  const int64_t padded = int64_t{p.center_tiles} * kTileCenters;
#pragma unroll
  for (int j = 0; j < kChunkTiles; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (j >= tiles) continue;
      const int center = (first_tile + j) * kTileCenters + 2 * (threadIdx.x % 4) + c;
      const float base = p.base[group * padded + center];
      const float slope = p.slope[group * padded + center];
#pragma unroll
      for (int r = 0; r < kRowTilesPerWarp; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float score = fmaf(slope, product[r][j][2 * half + c], base);
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

// The nearest centre among those that the four lanes of a row have seen.
__device__ inline void finish_rows(const Problem& p, int64_t group, int64_t warp_row,
                                   RowState& state) {
#pragma unroll
  for (int r = 0; r < kRowTilesPerWarp; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& best_score = state.best_score[r][half];
      int& best_center = state.best_center[r][half];
#pragma unroll
      for (int other = 2; other > 0; other /= 2) {
        const float score = __shfl_xor_sync(0xffffffffu, best_score, other);
        const int center = __shfl_xor_sync(0xffffffffu, best_center, other);
        if (is_nearer(score, center, best_score, best_center)) {
          best_score = score;
          best_center = center;
        }
      }
      const int64_t row = thread_row(warp_row, r, half);
      if (threadIdx.x % 4 == 0 && row < p.rows) {
        store_nearest(p, group, row, finish_distance(state.norm[r][half], best_score, best_center));
      }
    }
  }
}

__device__ inline void sum_quads(float (&norm)[kRowTilesPerWarp][2]) {
#pragma unroll
  for (int i = 0; i < 2 * kRowTilesPerWarp; ++i) {
    float& sum = norm[i / 2][i % 2];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  }
}

// grid = (tiles of kAssignRows rows, groups).
template <typename T>
__global__ void __launch_bounds__(kAssignThreads, 1) assign_kernel(Problem p, AssignShape shape) {
  constexpr int kElement = static_cast<int>(sizeof(T));
  constexpr int kStepBlocks = step_blocks(kElement);
  constexpr int kStageBytes = assign_stage_bytes(kElement);
  constexpr int kBlockBytes = kBlockColumns * kElement;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t group = blockIdx.y;
  const int64_t warp_row = int64_t{blockIdx.x} * kAssignRows + warp * kRowsPerWarp;
  const T* tokens = group_tokens<T>(p, group);
  const float* shift = p.shift + group * p.tokens.width;
  const int steps = shape.steps_per_chunk * shape.chunks;

  // The shift of all columns lies behind the stages, zeros after its end.
  float* shared_shift = reinterpret_cast<float*>(dynamic_shared() + shape.stages * kStageBytes);
  for (int d = threadIdx.x; d < p.column_blocks * kBlockColumns; d += kAssignThreads) {
    shared_shift[d] = d < p.tokens.width ? shift[d] : 0.0f;
  }

  const auto copy_step = [&](int step) {
    if (step < steps) {
      const int chunk = step / shape.steps_per_chunk;
      const int first_block = (step - chunk * shape.steps_per_chunk) * kStepBlocks;
      const int first_tile = chunk * shape.tiles_per_chunk;
      unsigned char* stage = dynamic_shared() + step % shape.stages * kStageBytes;
      copy_rows<T, kRowsPerWarp>(stage + warp * kRowsPerWarp * kAssignStride, kAssignStride, p,
                                 tokens, warp_row, p.rows, int64_t{first_block} * kBlockColumns,
                                 kStepBytes / 16);
      copy_centers(stage + kAssignRows * kAssignStride, p, group, first_block,
                   min(kStepBlocks, p.column_blocks - first_block), first_tile,
                   min(shape.tiles_per_chunk, p.center_tiles - first_tile));
    }
    commit_copies();
  };
  for (int step = 0; step < shape.stages - 1; ++step) copy_step(step);

  RowState state = {};
#pragma unroll
  for (int i = 0; i < 2 * kRowTilesPerWarp; ++i) state.best_score[i / 2][i % 2] = INFINITY;
  float product[kRowTilesPerWarp][kChunkTiles][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_for_oldest(shape.stages);
    __syncthreads();
    copy_step(step + shape.stages - 1);

    const int chunk = step / shape.steps_per_chunk;
    const int step_in_chunk = step - chunk * shape.steps_per_chunk;
    const int first_tile = chunk * shape.tiles_per_chunk;
    const int tiles = min(shape.tiles_per_chunk, p.center_tiles - first_tile);
    const unsigned char* stage = dynamic_shared() + step % shape.stages * kStageBytes;
    const unsigned char* rows_begin = stage + warp * kRowsPerWarp * kAssignStride;
    const uint4* centers =
        reinterpret_cast<const uint4*>(stage + kAssignRows * kAssignStride) + lane;
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      const int block = step_in_chunk * kStepBlocks + b;
      if (block < p.column_blocks) {
        Rows<T> values[kRowTilesPerWarp];
        float norm[kRowTilesPerWarp][2] = {};
#pragma unroll
        for (int r = 0; r < kRowTilesPerWarp; ++r) {
          values[r].load(rows_begin + r * 16 * kAssignStride + b * kBlockBytes, kAssignStride,
                         shared_shift + block * kBlockColumns, norm[r]);
          // Norms are needed once, not once per chunk.
          if (chunk == 0) {
            state.norm[r][0] += norm[r][0];
            state.norm[r][1] += norm[r][1];
          }
        }
#pragma unroll
        for (int j = 0; j < kChunkTiles; ++j) {
          if (j < tiles) {
            const Centers<T> part(centers[(b * kChunkTiles + j) * kWarp]);
#pragma unroll
            for (int r = 0; r < kRowTilesPerWarp; ++r) part.multiply_add(product[r][j], values[r]);
          }
        }
      }
    }
    if (step_in_chunk == shape.steps_per_chunk - 1) {
      if (chunk == 0) sum_quads(state.norm);
      finish_chunk(p, group, warp_row, first_tile, tiles, product, state);
#pragma unroll
      for (int r = 0; r < kRowTilesPerWarp; ++r) {
#pragma unroll
        for (int j = 0; j < kChunkTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) product[r][j][i] = 0.0f;
        }
      }
    }
  }
  if (!p.all_distances) finish_rows(p, group, warp_row, state);
}

}  // namespace spt_fast
