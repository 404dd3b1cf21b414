// Assign and accumulate in one read of the tokens on Hopper: half types, up to 128 centres.
//
// A cluster of 1 to 8 blocks goes through a run of tokens, 64 at a time; each block owns up to 192
// columns. Three tiles are under way at once, so that nobody waits for the exchange:
//   tile i:     each block multiplies its columns with those of the centres (wgmma), and sends each
//               token's products and its share of |x - shift|^2 to the block that decides on it;
//   tile i - 1: each block adds the shares of its 64 / blocks tokens up, chooses, and tells all;
//   tile i - 2: each block adds its columns up, as ones and zeros times the tile (wgmma), into sums
//               that stay in registers.
// One barrier of the cluster a tile separates the three.
//
// Centres are taken in the tokens' type alone; what that leaves out of a product is bounded by
// |low| |x - shift|. A token is given to a centre that is nearest in spite of the bound. The
// others, a few in a hundred, are listed, and the path of two reads does them:
// kmeans_cuda_rest.cuh. So labels are as exact as there. What the distances lack, sum of -2 / scale
// (x - shift) . low, follows from the sums.
//
// The arithmetic is in docs/design/kmeans-cuda.md. Limits: sm_90a; no weights; no distances.
#pragma once

#include "kmeans_cuda_products.cuh"
#include "kmeans_cuda_screen_centers.cuh"
#include "kmeans_cuda_tile.cuh"

namespace spt_fast {

constexpr int kScreenThreads = 256;
constexpr int kWarpgroup = 128;
constexpr int kScreenRows = 64;
constexpr int kMaxClusterBlocks = 8;
constexpr int kChunkBytes = kScreenRows * kChunkRowBytes;
constexpr int kTileBytes = kChunksPerBlock * kChunkBytes;
// Three tiles in use, two on their way.
constexpr int kTileStages = 5;
// 64 columns of b in a step of 16 rows: a product's.
constexpr int kStepRows = 16;
constexpr int kSteps = kScreenRows / kStepRows;
// The products of a token in a block: 8 lanes' (4 of each warpgroup) words.
constexpr int kShareBytes = 8 * kShareWords * 4;
// Products travel in units of a 32767th of the largest that can be, by Cauchy and Schwarz: as the
// lower 16 bits of a float32 between 2^23 and 2^23 + 2^16.
constexpr float kUnits = 32767.0f;
constexpr uint32_t kUnitsExponent = 0x4b000000u;
constexpr float kUnitsZero = 8388608.0f + 32768.0f;
// The largest can also be what the rounding of x . high leaves where x is near the shift.
constexpr float kProductRounding = 1.0f / (1 << 14);
constexpr float kLeastProduct = 1e-25f;
// Labels are numbers of the tokens' type, exact up to 256. Those of tokens that are summed nowhere:
constexpr int kOutside = -1;
constexpr int kUndecided = -2;
// Sums move to float64 once a lane, which sees a quarter of a tile, has seen so many tokens of a
// centre. Four lanes and the four steps of the last tile are then 128 adds at most.
constexpr int kTokensPerLane = 31;

// Tokens that are left for later.
struct Undecided {
  int64_t runs;       // as many as are screened: the first of the partial sums
  int64_t list_rows;  // room of a list
  uint32_t* lists;    // [G, runs, blocks, list_rows] rows, ascending
  int32_t* lengths;   // [G, runs, blocks]
};

// Where things are in the block's shared memory; offsets in bytes.
struct ScreenShape {
  int centers;
  int shares;        // [2, blocks, 64 / blocks] kShareBytes
  int norms;         // [2, blocks, 64 / blocks] NormShare
  int units_in_one;  // [64] of the tile that is sent
  int labels;        // [2, 64] as 16 bits
  int shift;         // [192]
  int offsets;       // [128]
  int lengths;       // [128]
  int base;          // [128] by slot, and so on
  int slope;
  int doubt;
  int bytes;
};

inline ScreenShape screen_shape(int half) {
  ScreenShape shape{};
  int next = kTileStages * kTileBytes;
  const auto take = [&next](int bytes) {
    const int offset = next;
    next += bytes;
    return offset;
  };
  const int floats = static_cast<int>(sizeof(float));
  shape.centers = take(kChunksPerBlock * 2 * half * kChunkRowBytes);
  shape.shares = take(2 * kScreenRows * kShareBytes);
  shape.norms = take(2 * kScreenRows * 2 * floats);
  shape.units_in_one = take(kScreenRows * floats);
  shape.labels = take(2 * kScreenRows * static_cast<int>(sizeof(uint16_t)));
  shape.shift = take(kScreenColumns * floats);
  shape.offsets = take(kMaxScreenCenters * floats);
  shape.lengths = take(kMaxScreenCenters * floats);
  shape.base = take(kMaxScreenCenters * floats);
  shape.slope = take(kMaxScreenCenters * floats);
  shape.doubt = take(kMaxScreenCenters * floats);
  shape.bytes = next;
  return shape;
}

#ifdef SPT_HAS_WARPGROUPS

// What a block does: some columns of a run of a group's tokens.
struct ScreenPart {
  int rank;      // in the cluster
  int log_rows;  // of the number of a tile's tokens that the block decides on
  int tiles;
  int num_chunks;
  int64_t run;
  int64_t group;
  int64_t list;   // number of the block's list
  int64_t begin;  // rows
  int64_t end;
  int64_t first_column;
  int64_t end_column;

  __device__ ScreenPart(const Problem& p, const ScreenedCenters& centers, int64_t runs)
      : rank(static_cast<int>(blockIdx.x) % centers.blocks),
        log_rows(__ffs(kScreenRows / centers.blocks) - 1),
        num_chunks(centers.columns_per_block / kChunkColumns),
        run(blockIdx.x / centers.blocks),
        group(blockIdx.y),
        list((group * runs + run) * centers.blocks + rank) {
    const int64_t run_rows = ceil_div(p.rows, runs);
    begin = min(run * run_rows, p.rows);
    end = min(begin + run_rows, p.rows);
    tiles = static_cast<int>(ceil_div(end - begin, kScreenRows));
    first_column = int64_t{rank} * centers.columns_per_block;
    end_column = min(first_column + centers.columns_per_block, p.tokens.width);
  }
  __device__ int64_t first_row(int tile) const { return begin + int64_t{tile} * kScreenRows; }
};

// The next tile's columns of this block, to be awaited; rows outside the run and columns outside
// the tokens become zeros. Eight lanes copy the 128 bytes of a row.
template <typename T>
__device__ inline void copy_screen_tile(unsigned char* tile, const Problem& p,
                                        const ScreenPart& part, const T* tokens,
                                        int64_t first_row) {
  constexpr int kPieces = kChunkRowBytes / 16;
  constexpr int kRowsPerStep = kScreenThreads / kPieces;
  const int column = threadIdx.x % kPieces * 8;
  const bool is_whole = p.granule == Granule::k16 && first_row + kScreenRows <= part.end &&
                        part.num_chunks == kChunksPerBlock &&
                        part.first_column + kScreenColumns <= p.tokens.width;
#pragma unroll
  for (int first = 0; first < kScreenRows; first += kRowsPerStep) {
    const int row = first + threadIdx.x / kPieces;
    const int64_t token = min(first_row + row, part.end - 1);
    const T* source = tokens + token_offset(p.tokens, token) + part.first_column + column;
    unsigned char* target = tile + swizzled_piece(row, column);
    if (is_whole) {
#pragma unroll
      for (int chunk = 0; chunk < kChunksPerBlock; ++chunk) {
        copy_async_16(target + chunk * kChunkBytes, source + chunk * kChunkColumns, 16);
      }
    } else {
      const int64_t left =
          first_row + row < part.end ? p.tokens.width - part.first_column - column : 0;
      for (int chunk = 0; chunk < part.num_chunks; ++chunk) {
        copy_piece(target + chunk * kChunkBytes, source + chunk * kChunkColumns,
                   left - chunk * kChunkColumns, p.granule);
      }
    }
  }
}

// Starts the products of a tile with this warpgroup's half of the centres.
template <typename T, int kHalf>
__device__ inline void start_products(float (&product)[kHalf / 2], const unsigned char* tile,
                                      const unsigned char* centers) {
  constexpr int kStepBytes = kStepRows * static_cast<int>(sizeof(T));
  const auto rows = swizzled_matrix(tile, 0);
  const auto columns = swizzled_matrix(centers, 0);
#pragma unroll
  for (int chunk = 0; chunk < kChunksPerBlock; ++chunk) {
#pragma unroll
    for (int step = 0; step < kChunkRowBytes / kStepBytes; ++step) {
      multiply_shared(product, advance(rows, chunk * kChunkBytes + step * kStepBytes),
                      advance(columns, chunk * 2 * kHalf * kChunkRowBytes + step * kStepBytes),
                      chunk + step > 0, T{});
    }
  }
}

// Who decides on which tokens of a tile: block r on rows [r rows, (r + 1) rows).
struct Exchange {
  int rank;
  int log_rows;
  int parity;  // of the tile

  __device__ Exchange(const ScreenPart& part, int tile)
      : rank(part.rank), log_rows(part.log_rows), parity(tile & 1) {}

  __device__ int rows() const { return 1 << log_rows; }  // 64 / blocks
  __device__ int blocks() const { return kScreenRows >> log_rows; }
  __device__ int decider(int row) const { return row >> log_rows; }
  // Where block `sender` puts what concerns `row`, in the arrays of the block that decides.
  __device__ int place(int sender, int row) const {
    return parity * kScreenRows + (sender << log_rows) + (row & (rows() - 1));
  }
};

// |x| and a little more, from |x|^2.
__device__ inline float length_of(float norm) {
  const float positive = fmaxf(norm, 1e-30f);
  return positive * rsqrtf(positive) * 1.0001f;
}

// A block's share of |x - shift|^2, and what a unit of its products is worth.
struct alignas(8) NormShare {
  float norm;
  float unit;
};

// This block's shares of |x - shift|^2 of a tile, to the blocks that decide; four lanes a row.
template <typename T>
__device__ inline void send_norms(const ScreenShape& shape, const Exchange& exchange,
                                  const unsigned char* tile, float longest_center,
                                  float least_product) {
  constexpr int kPieces = 2;  // of a chunk, neighbours, for a lane
  const int row = threadIdx.x / 4;
  const int first_column = threadIdx.x % 4 * kPieces * 8;
  const float* shift = shared_at<float>(shape.shift);
  float norm = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < kChunksPerBlock; ++chunk) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int column = first_column + piece * 8;
      const uint4 words =
          *reinterpret_cast<const uint4*>(tile + chunk * kChunkBytes + swizzled_piece(row, column));
      const float* s = shift + chunk * kChunkColumns + column;
      const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack(pairs[i], T{});
        add_square(norm, x.x, s[2 * i]);
        add_square(norm, x.y, s[2 * i + 1]);
      }
    }
  }
  norm += __shfl_xor_sync(0xffffffffu, norm, 1);
  norm += __shfl_xor_sync(0xffffffffu, norm, 2);
  if (threadIdx.x % 4 != 0) return;
  const float unit = (length_of(norm) * longest_center + least_product) * (1.001f / kUnits);
  shared_at<float>(shape.units_in_one)[row] = __frcp_rn(unit);
  NormShare* place = shared_at<NormShare>(shape.norms) + exchange.place(exchange.rank, row);
  store_remote(in_block(place, exchange.decider(row)),
               uint2{__float_as_uint(norm), __float_as_uint(unit)});
}

// A product in units, to the nearest, as the lower 16 bits.
__device__ inline uint32_t to_units(float product, float units_in_one) {
  return __float_as_uint(fmaf(product, units_in_one, kUnitsZero));
}
__device__ inline float from_units(uint32_t bits) {
  return __uint_as_float(kUnitsExponent | bits) - kUnitsZero;
}

// Sends products less their offsets, (x - shift) . high, to the blocks that decide.
template <int kHalf>
__device__ inline void send_products(const ScreenShape& shape, const Exchange& exchange,
                                     const float (&product)[kHalf / 2]) {
  const int lane = threadIdx.x % kWarp;
  const int group = threadIdx.x / kWarpgroup;
  const float* offsets = shared_at<float>(shape.offsets) + group * kHalf + 2 * (lane % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = threadIdx.x % kWarpgroup / kWarp * 16 + half * 8 + lane / 4;
    const float units_in_one = shared_at<float>(shape.units_in_one)[row];
    uint32_t words[kShareWords] = {};
#pragma unroll
    for (int w = 0; w < kHalf / 8; ++w) {
      const float2 offset = *reinterpret_cast<const float2*>(offsets + 8 * w);
      words[w] = (to_units(product[4 * w + 2 * half] - offset.x, units_in_one) & 0xffffu) |
                 to_units(product[4 * w + 2 * half + 1] - offset.y, units_in_one) << 16;
    }
    unsigned char* place = shared_at<unsigned char>(shape.shares) +
                           exchange.place(exchange.rank, row) * kShareBytes +
                           (group * 4 + lane % 4) * kShareWords * 4;
    const int receiver = exchange.decider(row);
    store_remote(in_block(place, receiver), uint4{words[0], words[1], words[2], words[3]});
    if constexpr (kHalf > 32) {
      store_remote(in_block(place + 16, receiver), uint4{words[4], words[5], words[6], words[7]});
    }
  }
}

// The centre of a token as far as the screen can tell.
struct Choice {
  int slot;        // kUndecided if several centres may be nearest
  float distance;  // less 2 / scale (x - shift) . low
};

// What 16 lanes know of a token: the products of slots 8 lane to 8 lane + 7 in each.
struct Candidates {
  float norm = 0.0f;
  float unit = 0.0f;  // sum of the blocks'
  float product[8] = {};

  __device__ void add_shares(const ScreenShape& shape, const Exchange& exchange, int row) {
    for (int block = 0; block < exchange.blocks(); ++block) {
      const int place = exchange.place(block, row);
      const NormShare share = shared_at<NormShare>(shape.norms)[place];
      norm += share.norm;
      unit += share.unit;
      const uint4 words = *reinterpret_cast<const uint4*>(
          shared_at<unsigned char>(shape.shares) + place * kShareBytes + threadIdx.x % 16 * 16);
      const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        product[2 * i] = fmaf(share.unit, from_units(pairs[i] & 0xffffu), product[2 * i]);
        product[2 * i + 1] = fmaf(share.unit, from_units(pairs[i] >> 16), product[2 * i + 1]);
      }
    }
  }

  __device__ Choice choose(const ScreenShape& shape) const {
    const int first_slot = threadIdx.x % 16 * 8;
    const float length = length_of(norm);
    float score[8];
    float lowest[8];
    float bound = INFINITY;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float slope = shared_at<float>(shape.slope)[first_slot + i];
      score[i] = fmaf(slope, product[i], shared_at<float>(shape.base)[first_slot + i]);
      // A product is off by half a unit of each block.
      const float doubt =
          fmaf(length, shared_at<float>(shape.doubt)[first_slot + i], -0.505f * slope * unit);
      lowest[i] = score[i] - doubt;
      bound = fminf(bound, score[i] + doubt);
    }
#pragma unroll
    for (int other = 8; other > 0; other /= 2) {
      bound = fminf(bound, __shfl_xor_sync(0xffffffffu, bound, other));
    }
    // Number of candidates in the upper half, sum of their slots in the lower one; their scores.
    uint32_t found = 0;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (lowest[i] <= bound) {
        found += 0x10000u + first_slot + i;
        total += score[i];
      }
    }
#pragma unroll
    for (int other = 8; other > 0; other /= 2) {
      found += __shfl_xor_sync(0xffffffffu, found, other);
      total += __shfl_xor_sync(0xffffffffu, total, other);
    }
    const bool decided = found >> 16 == 1 && norm + fabsf(total) < INFINITY;
    return {decided ? static_cast<int>(found & 0xffffu) : kUndecided, norm + total};
  }
};

// A label as a number of type T.
__device__ inline uint16_t label_bits(int label, __nv_bfloat16) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(label)));
}
__device__ inline uint16_t label_bits(int label, __half) {
  return __half_as_ushort(__float2half_rn(static_cast<float>(label)));
}

// Decides on this block's tokens of a tile and tells all blocks, by a lane each of the 16 that look
// at a token; the first of them adds the distances up.
template <typename T>
__device__ inline void decide_tile(const Problem& p, const ScreenShape& shape,
                                   const ScreenPart& part, const Exchange& exchange, int half,
                                   int64_t tile_row, double& inertia) {
  constexpr int kTogether = kScreenThreads / 16;
  for (int first = 0; first < exchange.rows(); first += kTogether) {
    const int row = first + threadIdx.x / 16;
    const bool exists = row < exchange.rows();
    Candidates candidates;
    candidates.add_shares(shape, exchange, exists ? row : 0);
    const Choice choice = candidates.choose(shape);  // the same in all 16 lanes
    const int lane = threadIdx.x % 16;
    if (lane >= exchange.blocks() || !exists) continue;

    const int tile_place = (exchange.rank << exchange.log_rows) + row;
    const int64_t token = tile_row + tile_place;
    int label = kOutside;
    if (part.begin <= token && token < part.end) {
      label = choice.slot < 0 ? choice.slot : center_of_slot(choice.slot, half);
      if (lane == 0 && label >= 0) {
        p.labels[part.group * p.rows + token] = label;
        inertia += choice.distance;
      }
    }
    const uint16_t* place =
        shared_at<uint16_t>(shape.labels) + exchange.parity * kScreenRows + tile_place;
    store_remote(in_block(place, lane), label_bits(label, T{}));
  }
}

// Sums of this block's columns, rows of the warpgroup's 64 centres; a thread has two of these.
template <typename T>
struct ScreenSums {
  float values[kChunksPerBlock][32] = {};
  uint32_t members[2] = {};  // tokens that this lane has seen since the sums last moved, as a pair
  int moved_members[2] = {};
  bool first = true;

  // Starts sums += membership * tile. `membership` must stay until that is done: per step, rows
  // lane / 4 and 8 more of the warp's 16 centres, of tokens 2 (lane % 4) and 8 more.
  __device__ void start(uint32_t (&membership)[kSteps][4], const unsigned char* tile,
                        const uint16_t* labels) {
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(labels) + threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t center = label_bits(static_cast<int>(thread_center(half)), T{}) * 0x10001u;
#pragma unroll
      for (int i = half; i < 4 * kSteps; i += 2) {
        uint32_t& ones = membership[i / 4][i % 4];
        ones = equal_ones(pairs[i / 2 * 4], center, T{});
        members[half] = add_pairs(members[half], ones, T{});
      }
    }
    begin_products();
    const auto rows = swizzled_matrix(tile, kChunkBytes);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int chunk = 0; chunk < kChunksPerBlock; ++chunk) {
        multiply_registers(values[chunk], membership[step],
                           advance(rows, chunk * kChunkBytes + step * kStepRows * kChunkRowBytes),
                           T{});
      }
    }
  }

  // Moves the warp's sums to the run's float64 partials and clears them.
  __device__ void move(const Problem& p, const ScreenPart& part, double* partial) {
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = p.tokens.width + kExtraColumns;
#pragma unroll
    for (int chunk = 0; chunk < kChunksPerBlock; ++chunk) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int64_t center = thread_center(i % 4 / 2);
        const int64_t column =
            part.first_column + chunk * kChunkColumns + i / 4 * 8 + 2 * (lane % 4) + i % 2;
        if (center < p.num_centers && column < part.end_column) {
          double& total = partial[center * stride + column];
          total = first ? values[chunk][i] : total + values[chunk][i];
        }
        values[chunk][i] = 0.0f;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      moved_members[half] += static_cast<int>(unmoved(half));
      members[half] = 0;
    }
    first = false;
  }

  __device__ bool must_move() const {
    return __any_sync(0xffffffffu, fmaxf(unmoved(0), unmoved(1)) > kTokensPerLane);
  }

  __device__ float unmoved(int half) const {
    const float2 pair = unpack(members[half], T{});
    return pair.x + pair.y;
  }

  // How many tokens belong to one of the thread's two centres, when all have moved.
  __device__ double count(int half) const {
    int number = moved_members[half];
    number += __shfl_xor_sync(0xffffffffu, number, 1);
    number += __shfl_xor_sync(0xffffffffu, number, 2);
    return static_cast<double>(number);
  }

  // Counts of the warp's centres.
  __device__ void store_counts(const Problem& p, double* partial) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const double number = count(half);
      const int64_t center = thread_center(half);
      if (threadIdx.x % 4 == 0 && center < p.num_centers) {
        partial[center * (p.tokens.width + kExtraColumns) + p.tokens.width] = number;
      }
    }
  }

  // What the distances of this thread's columns and centres lack, from sums that have moved.
  __device__ double missing_distance(const Problem& p, const ScreenShape& shape,
                                     const ScreenPart& part, const double* partial,
                                     int warpgroup_half) const {
    const int64_t stride = p.tokens.width + kExtraColumns;
    double missing = 0.0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const double number = count(half);
      const int64_t center = thread_center(half);
      if (center >= p.num_centers) continue;
      const float* values_of = p.centers + (part.group * p.num_centers + center) * p.tokens.width;
      const int slot = slot_of_center(static_cast<int>(center), warpgroup_half);
      const float slope = shared_at<float>(shape.slope)[slot];
      for (int i = 0; i < kChunksPerBlock * 16; ++i) {
        const int64_t column = part.first_column + i / 2 * 8 + 2 * (threadIdx.x % 4) + i % 2;
        if (column >= part.end_column) continue;
        const float shift = p.shift[part.group * p.tokens.width + column];
        const double low = split_low<T>(values_of[column] - shift, -2.0f / slope);
        missing += slope * low * (partial[center * stride + column] - number * shift);
      }
    }
    return missing;
  }

  __device__ static int64_t thread_center(int half) {
    return threadIdx.x / kWarp * 16 + half * 8 + threadIdx.x % kWarp / 4;
  }
};

// Rows of the block's own tokens of a tile that have no decision, to the end of its list; one warp.
template <typename T>
__device__ inline void list_undecided(const ScreenShape& shape, const Exchange& exchange,
                                      int64_t tile_row, uint32_t* list, int& length) {
  const unsigned lane = threadIdx.x % kWarp;
  const int first_row = exchange.rank << exchange.log_rows;
  const uint16_t* labels =
      shared_at<uint16_t>(shape.labels) + exchange.parity * kScreenRows + first_row;
  for (int first = 0; first < exchange.rows(); first += kWarp) {
    const int row = first + static_cast<int>(lane);
    const bool undecided = row < exchange.rows() && labels[row] == label_bits(kUndecided, T{});
    const unsigned all = __ballot_sync(0xffffffffu, undecided);
    if (undecided) {
      const int place = length + __popc(all & ((1u << lane) - 1));
      list[place] = static_cast<uint32_t>(tile_row + first_row + row);
    }
    length += __popc(all);
  }
}

// The block's part of the centres, for the whole run; empty tiles; labels of tokens before the run.
template <typename T, int kHalf>
__device__ inline void load_screen(const Problem& p, const ScreenShape& shape,
                                   const ScreenedCenters& centers, const ScreenPart& part) {
  constexpr int kPacked = kChunksPerBlock * 2 * kHalf * kChunkRowBytes / 16;
  const auto* packed = reinterpret_cast<const uint4*>(centers.packed) +
                       (part.group * centers.blocks + part.rank) * kPacked;
  for (int i = threadIdx.x; i < kPacked; i += kScreenThreads) {
    shared_at<uint4>(shape.centers)[i] = packed[i];
  }
  for (int i = threadIdx.x; i < kTileStages * kTileBytes / 16; i += kScreenThreads) {
    shared_at<uint4>(0)[i] = {0, 0, 0, 0};
  }
  if (threadIdx.x < 2 * kScreenRows) {
    shared_at<uint16_t>(shape.labels)[threadIdx.x] = label_bits(kOutside, T{});
  }
  if (threadIdx.x < kScreenColumns) {
    const int64_t column = part.first_column + threadIdx.x;
    const bool inside = column < part.end_column;
    shared_at<float>(shape.shift)[threadIdx.x] =
        inside ? p.shift[part.group * p.tokens.width + column] : 0.0f;
  }
  if (threadIdx.x < kMaxScreenCenters) {
    const int64_t slot = part.group * kMaxScreenCenters + threadIdx.x;
    const int64_t own = (part.group * centers.blocks + part.rank) * kMaxScreenCenters + threadIdx.x;
    shared_at<float>(shape.offsets)[threadIdx.x] = centers.offsets[own];
    shared_at<float>(shape.lengths)[threadIdx.x] = centers.lengths[own];
    shared_at<float>(shape.base)[threadIdx.x] = centers.base[slot];
    shared_at<float>(shape.slope)[threadIdx.x] = centers.slope[slot];
    shared_at<float>(shape.doubt)[threadIdx.x] = centers.doubt[slot];
  }
}

__device__ inline float shift_length(const ScreenShape& shape) {
  float norm = 0.0f;
  for (int i = 0; i < kScreenColumns; ++i) add_square(norm, shared_at<float>(shape.shift)[i], 0.0f);
  return length_of(norm);
}

__device__ inline float longest_of(const float* lengths, int centers) {
  float longest = 0.0f;
  for (int k = 0; k < centers; ++k) longest = fmaxf(longest, lengths[k]);
  return longest;
}

// The sum over all threads of the cluster, in their order, for thread 0 of block 0. No block may be
// reading products or norms any more.
__device__ inline double sum_of_cluster(const ScreenShape& shape, const ScreenPart& part,
                                        double mine) {
  double* of_threads = shared_at<double>(shape.shares);
  double* of_blocks = shared_at<double>(shape.norms);
  of_threads[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int i = 0; i < kScreenThreads; ++i) total += of_threads[i];
    const auto bits = static_cast<uint64_t>(__double_as_longlong(total));
    store_remote(in_block(of_blocks + part.rank, 0),
                 uint2{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)});
  }
  cluster_arrive();
  cluster_wait();
  double total = 0.0;
  if (part.rank == 0) {
    for (int block = 0; block < kScreenRows >> part.log_rows; ++block) total += of_blocks[block];
  }
  return total;
}

#endif  // SPT_HAS_WARPGROUPS

// A cluster per run and group: grid = (runs x blocks, groups). Centres are taken in two halves of
// kHalf, one for each warpgroup.
template <typename T, int kHalf>
__global__ void __launch_bounds__(kScreenThreads, 1)
    screen_kernel(Problem p, ScreenShape shape, ScreenedCenters centers, Undecided undecided) {
#ifdef SPT_HAS_WARPGROUPS
  const ScreenPart part(p, centers, undecided.runs);
  uint32_t* list = undecided.lists + part.list * undecided.list_rows;
  double* partial = run_partial(p, part.group, part.run);
  const T* tokens = group_tokens<T>(p, part.group);
  // From lane 0, so that the compiler sees that it is the same for all lanes.
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  const unsigned char* own_centers =
      shared_at<unsigned char>(shape.centers) + warpgroup * kHalf * kChunkRowBytes;
  const auto tile_at = [](int tile) {
    return dynamic_shared() + (tile + kTileStages) % kTileStages * kTileBytes;
  };
  const auto copy_tile = [&](int tile) {
    if (tile < part.tiles) copy_screen_tile(tile_at(tile), p, part, tokens, part.first_row(tile));
    commit_copies();
  };

  load_screen<T, kHalf>(p, shape, centers, part);
  show_to_warpgroups();
  __syncthreads();
  copy_tile(0);
  copy_tile(1);
  cluster_arrive();
  const float longest_center = longest_of(shared_at<float>(shape.lengths), 2 * kHalf);
  const float least_product =
      longest_center * shift_length(shape) * kProductRounding + kLeastProduct;

  ScreenSums<T> sums;
  float product[kHalf / 2];
  double inertia = 0.0;
  int length = 0;
  // Rounds beyond the tiles work on tiles that are not there, whose tokens are outside the run.
  for (int i = 0; i < part.tiles + 2; ++i) {
    wait_copies<1>();
    show_to_warpgroups();
    __syncthreads();
    copy_tile(i + 2);
    begin_products();
    start_products<T, kHalf>(product, tile_at(i), own_centers);
    commit_products();

    cluster_wait();
    const Exchange summed(part, i - 2);
    uint32_t membership[kSteps][4];
    sums.start(membership, tile_at(i - 2),
               shared_at<uint16_t>(shape.labels) + summed.parity * kScreenRows);
    commit_products();
    if (threadIdx.x < kWarp) {
      list_undecided<T>(shape, summed, part.first_row(i - 2), list, length);
    }
    decide_tile<T>(p, shape, part, Exchange(part, i - 1), kHalf, part.first_row(i - 1), inertia);

    const Exchange multiplied(part, i);
    send_norms<T>(shape, multiplied, tile_at(i), longest_center, least_product);
    __syncthreads();
    wait_products<1>();
    send_products<kHalf>(shape, multiplied, product);
    cluster_arrive();
    wait_products<0>();
    if (sums.must_move()) sums.move(p, part, partial);
  }
  cluster_wait();

  sums.move(p, part, partial);
  if (part.rank == 0) sums.store_counts(p, partial);
  inertia += sums.missing_distance(p, shape, part, partial, kHalf);
  if (threadIdx.x == 0) undecided.lengths[part.list] = length;
  const double total = sum_of_cluster(shape, part, inertia);
  if (part.rank == 0 && threadIdx.x == 0) {
    partial[p.tokens.width + 1] = fabs(total) < INFINITY ? fmax(total, 0.0) : INFINITY;
  }
#endif
}

}  // namespace spt_fast
