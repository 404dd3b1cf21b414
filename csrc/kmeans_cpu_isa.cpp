// The k-means kernels for one instruction set; compiled once for each, with SPT_ISA naming it.
//
// A block of kRows tokens is widened to float32, shifted and kept in L1. Its inner products with
// the centres are a small matrix product: tokens are broadcast, centres are read as vectors from
// panels, and the sums stay in registers over the whole width. The same block is then added to the
// sums of its nearest centres, so that a token is read from memory once. No function template of
// the standard library is used here: its code would be shared with objects built for older
// processors.
#include "kmeans_cpu_isa.h"

#include <cmath>
#include <cstring>

namespace spt_fast {
namespace SPT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRows = 8;  // 8 x 3 accumulators + 3 panel vectors of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRows = 4;  // 4 x 3 accumulators + 3 panel vectors of 16 registers
#else
constexpr int kLanes = 4;  // SSE2, NEON
constexpr int kRows = 4;
#endif
constexpr int kMaxVectors = 3;  // vectors of a panel

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// ---- Widening
// -------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

float widen(float x) { return x; }

float widen(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

// Free of branches, so that the compiler vectorises it: the multiplication by 2^112 moves the
// exponent from half's bias to float's and normalises subnormals; infinity and NaN get the rest.
float widen(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const float scaled = float_from_bits(magnitude << 13) * float_from_bits((127u + 112u) << 23);
  uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof(bits));
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return float_from_bits(bits | sign);
}

template <class T>
void widen_row(const T* __restrict source, const float* __restrict shift, int64_t width,
               float* __restrict row) {
  if (shift == nullptr) {
    for (int64_t d = 0; d < width; ++d) row[d] = widen(source[d]);
  } else {
    for (int64_t d = 0; d < width; ++d) row[d] = widen(source[d]) - shift[d];
  }
}

int64_t token_offset(const GroupTokens& tokens, int64_t m) {
  return (m / tokens.inner) * tokens.outer_stride + (m % tokens.inner) * tokens.inner_stride;
}

void load_token(const GroupTokens& tokens, int64_t m, float* row) {
  const int64_t offset = token_offset(tokens, m);
  switch (tokens.dtype) {
    case DType::kFloat32:
      return widen_row(static_cast<const float*>(tokens.base) + offset, tokens.shift, tokens.width,
                       row);
    case DType::kFloat16:
      return widen_row(static_cast<const Half*>(tokens.base) + offset, tokens.shift, tokens.width,
                       row);
    case DType::kBFloat16:
      return widen_row(static_cast<const BFloat16*>(tokens.base) + offset, tokens.shift,
                       tokens.width, row);
  }
}

float squared_norm(const float* row, int64_t width) {
  Vec even = {}, odd = {};
  int64_t d = 0;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
    const Vec a = load(row + d), b = load(row + d + kLanes);
    even += a * a;
    odd += b * b;
  }
  even += odd;
  float total = 0.f;
  for (int lane = 0; lane < kLanes; ++lane) total += even[lane];
  for (; d < width; ++d) total += row[d] * row[d];
  return total;
}

// A block of up to kRows widened tokens; rows past `count` are zero.
struct Block {
  float* rows;  // [kRows, width]
  float norms[kRows];
  int count;
};

void load_block(const GroupTokens& tokens, int64_t begin, int64_t end, Block& block) {
  const int64_t left = end - begin;
  block.count = left < kRows ? static_cast<int>(left) : kRows;
  for (int r = 0; r < kRows; ++r) {
    float* row = block.rows + r * tokens.width;
    if (r < block.count) {
      load_token(tokens, begin + r, row);
      block.norms[r] = squared_norm(row, tokens.width);
    } else {
      std::memset(row, 0, tokens.width * sizeof(float));
      block.norms[r] = 0.f;
    }
  }
}

// ---- Panels
// ---------------------------------------------------------------------------------------

int64_t num_vectors(int64_t num_centers) { return (num_centers + kLanes - 1) / kLanes; }

// Vectors are dealt out evenly: 4 of them make two panels of 2, not one of 3 and one of 1.
template <class Fn>
void for_each_panel(int64_t num_centers, Fn fn) {
  const int64_t vectors = num_vectors(num_centers);
  const int64_t panels = (vectors + kMaxVectors - 1) / kMaxVectors;
  int64_t first = 0;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t count = vectors / panels + (p < vectors % panels ? 1 : 0);
    fn(first * kLanes, static_cast<int>(count));
    first += count;
  }
}

// A panel holds, for each d, the d-th elements of its centres side by side.
void pack(const float* centers, const float* shift, int64_t num_centers, int64_t width,
          float* panels, float* half_norms) {
  for_each_panel(num_centers, [&](int64_t first, int count) {
    const int64_t columns = count * kLanes;
    float* panel = panels + first * width;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t k = first + c;
      double norm = 0.;
      for (int64_t d = 0; d < width; ++d) {
        const float value =
            k < num_centers ? centers[k * width + d] - (shift ? shift[d] : 0.f) : 0.f;
        panel[d * columns + c] = value;
        norm += static_cast<double>(value) * value;
      }
      half_norms[k] = k < num_centers ? static_cast<float>(0.5 * norm) : INFINITY;
    }
  });
}

int64_t padded_centers(int64_t num_centers) { return num_vectors(num_centers) * kLanes; }

int64_t scratch_floats(int64_t width) { return kRows * width; }

// scores[r][v] = |c|^2 / 2 - x.c: half of the squared distance, less |x|^2 / 2.
template <int kVectors>
void score_panel(const float* rows, int64_t width, const float* panel, const float* half_norms,
                 Vec (&scores)[kRows][kMaxVectors]) {
  Vec dots[kRows][kVectors] = {};
  for (int64_t d = 0; d < width; ++d) {
    Vec c[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) c[v] = load(panel + (d * kVectors + v) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec x = rows[r * width + d] - Vec{};
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) dots[r][v] += x * c[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) scores[r][v] = load(half_norms + v * kLanes) - dots[r][v];
  }
}

template <class Fn>
void for_each_score_panel(const Block& block, int64_t width, const PackedCenters& centers, Fn fn) {
  for_each_panel(centers.num_centers, [&](int64_t first, int count) {
    const float* panel = centers.panels + first * width;
    const float* half_norms = centers.half_norms + first;
    Vec scores[kRows][kMaxVectors];
    switch (count) {
      case 1:
        score_panel<1>(block.rows, width, panel, half_norms, scores);
        break;
      case 2:
        score_panel<2>(block.rows, width, panel, half_norms, scores);
        break;
      default:
        score_panel<3>(block.rows, width, panel, half_norms, scores);
    }
    fn(first, count, scores);
  });
}

// NaN is kept: it is how the caller learns of a token that is not finite.
float squared_distance(float norm, float score) {
  const float value = norm + 2.f * score;
  return value < 0.f ? 0.f : value;
}

// ---- Assign and accumulate
// ------------------------------------------------------------------------

struct Nearest {
  float score[kRows];
  int32_t label[kRows];
};

IntVec lane_numbers() {
  IntVec lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

Nearest find_nearest(const Block& block, int64_t width, const PackedCenters& centers) {
  Vec best[kRows];
  IntVec label[kRows];
  for (int r = 0; r < kRows; ++r) {
    best[r] = INFINITY - Vec{};
    label[r] = IntVec{};
  }
  const IntVec lanes = lane_numbers();
  for_each_score_panel(block, width, centers, [&](int64_t first, int count, auto& scores) {
    for (int v = 0; v < count; ++v) {
      const IntVec candidates = lanes + static_cast<int32_t>(first + v * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vec score = scores[r][v];
        label[r] = score < best[r] ? candidates : label[r];
        best[r] = score < best[r] ? score : best[r];
      }
    }
  });
  Nearest nearest;
  for (int r = 0; r < kRows; ++r) {
    nearest.score[r] = best[r][0];
    nearest.label[r] = label[r][0];
    for (int lane = 1; lane < kLanes; ++lane) {
      const float score = best[r][lane];
      const int32_t candidate = label[r][lane];
      const bool wins =
          score < nearest.score[r] || (score == nearest.score[r] && candidate < nearest.label[r]);
      nearest.score[r] = wins ? score : nearest.score[r];
      nearest.label[r] = wins ? candidate : nearest.label[r];
    }
  }
  return nearest;
}

void add_scaled(const float* __restrict row, float weight, int64_t width, float* __restrict sum) {
  for (int64_t d = 0; d < width; ++d) sum[d] += weight * row[d];
}

void assign(const AssignChunk& chunk) {
  const int64_t width = chunk.tokens.width;
  Block block{chunk.scratch, {}, 0};
  double inertia = 0.;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kRows) {
    load_block(chunk.tokens, begin, chunk.end, block);
    const Nearest nearest = find_nearest(block, width, chunk.centers);
    for (int r = 0; r < block.count; ++r) {
      const int64_t m = begin + r;
      const int32_t label = nearest.label[r];
      const float distance = squared_distance(block.norms[r], nearest.score[r]);
      const float weight = chunk.weights ? chunk.weights[m] : 1.f;
      add_scaled(block.rows + r * width, weight, width, chunk.sums + label * width);
      chunk.counts[label] += weight;
      inertia += static_cast<double>(weight) * distance;
      if (chunk.labels) chunk.labels[m] = label;
      if (chunk.distances) chunk.distances[m] = distance;
    }
  }
  *chunk.inertia += inertia;
}

// ---- All distances
// --------------------------------------------------------------------------------

void distances(const DistanceChunk& chunk) {
  const int64_t width = chunk.tokens.width;
  const int64_t num_centers = chunk.centers.num_centers;
  Block block{chunk.scratch, {}, 0};
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kRows) {
    load_block(chunk.tokens, begin, chunk.end, block);
    for_each_score_panel(block, width, chunk.centers, [&](int64_t first, int count, auto& scores) {
      for (int r = 0; r < block.count; ++r) {
        float* out = chunk.distances + (begin + r) * num_centers;
        for (int c = 0; c < count * kLanes && first + c < num_centers; ++c) {
          out[first + c] = squared_distance(block.norms[r], scores[r][c / kLanes][c % kLanes]);
        }
      }
    });
  }
}

#define SPT_STRINGIFY_(x) #x
#define SPT_STRINGIFY(x) SPT_STRINGIFY_(x)

}  // namespace

const CpuKernels& kernels() {
  static const CpuKernels table = {
      SPT_STRINGIFY(SPT_ISA), padded_centers, scratch_floats, pack, assign, distances};
  return table;
}

}  // namespace SPT_ISA
}  // namespace spt_fast
