// The k-means kernels for one instruction set; compiled once for each, with SPT_ISA naming it.
//
// A block of kRows tokens is widened to float32, shifted and kept in L1. Its inner products with
// the centres are a small matrix product: tokens are broadcast, centres are read as vectors from
// panels, and the sums stay in registers over the whole width. The same block is then added to the
// sums of its nearest centres, so that a token is read from memory once. A score is the same
// number, bit for bit, whatever the panel and the block it is computed in: that is why pruning does
// not change a label. No function template of the standard library is used here: its code would be
// shared with objects built for older processors.
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
constexpr int kCacheLine = 64;
constexpr int kMaxVectors = 3;  // vectors of a panel

// Centres that share a lower bound: 16, or 12 where a panel holds no more.
constexpr int kGroupVectors = kLanes == 4 ? 3 : 16 / kLanes;
constexpr int kGroup = kGroupVectors * kLanes;

// Tokens that are refined together. They stay in L2 until their last group is done.
constexpr int kMostTileRows = 64;
constexpr int64_t kTileFloats = 65536;

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

// Tokens as they lie in memory, fetched into the cache while others are scored. Left to itself the
// processor waits for each block anew: a pass takes 1.1 (K = 100) to 1.4 times (K = 5) as long.
struct Upcoming {
  const char* rows[kRows];
  int64_t bytes;  // of an element

  // Asks for the cache lines that start at column d; to be called for every d.
  void prefetch(int64_t d) const {
    if (d * bytes % kCacheLine != 0) return;
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(rows[r] + d * bytes);
  }
};

Upcoming upcoming_tokens(const GroupTokens& tokens, int64_t begin, int64_t end) {
  Upcoming upcoming;
  upcoming.bytes = element_bytes(tokens.dtype);
  for (int r = 0; r < kRows; ++r) {
    const int64_t m = begin + r < end ? begin + r : end - 1;
    upcoming.rows[r] =
        static_cast<const char*>(tokens.base) + token_offset(tokens, m) * upcoming.bytes;
  }
  return upcoming;
}

// A block of up to kRows widened tokens; rows past `count` repeat the last one.
struct Block {
  const float* rows[kRows];
  float norms[kRows];
  int count;
  Upcoming upcoming;  // the next block
};

Block load_block(const GroupTokens& tokens, int64_t begin, int64_t end, float* scratch) {
  Block block;
  block.count = end - begin < kRows ? static_cast<int>(end - begin) : kRows;
  block.upcoming = upcoming_tokens(tokens, begin + kRows, end);
  for (int r = 0; r < kRows; ++r) {
    if (r >= block.count) {
      block.rows[r] = block.rows[r - 1];
      block.norms[r] = block.norms[r - 1];
      continue;
    }
    float* row = scratch + r * tokens.width;
    load_token(tokens, begin + r, row);
    block.rows[r] = row;
    block.norms[r] = squared_norm(row, tokens.width);
  }
  return block;
}

// ---- Panels
// ---------------------------------------------------------------------------------------

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t num_vectors(int64_t num_centers) { return divide_up(num_centers, kLanes); }

int64_t num_groups(int64_t num_centers) { return divide_up(num_centers, kGroup); }

// Vectors are dealt out evenly: 4 of them make two panels of 2, not one of 3 and one of 1.
template <class Fn>
void for_each_panel(int64_t num_centers, Fn fn) {
  const int64_t vectors = num_vectors(num_centers);
  const int64_t panels = divide_up(vectors, kMaxVectors);
  int64_t first = 0;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t count = vectors / panels + (p < vectors % panels ? 1 : 0);
    fn(first * kLanes, static_cast<int>(count));
    first += count;
  }
}

// A panel holds, for each d, the d-th elements of its centres side by side.
void pack_panel(const float* centers, const float* shift, int64_t num_centers, int64_t width,
                int64_t first, int64_t columns, float* panel, float* half_norms) {
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t k = first + c;
    double norm = 0.;
    for (int64_t d = 0; d < width; ++d) {
      const float value = k < num_centers ? centers[k * width + d] - (shift ? shift[d] : 0.f) : 0.f;
      panel[d * columns + c] = value;
      norm += static_cast<double>(value) * value;
    }
    half_norms[c] = k < num_centers ? static_cast<float>(0.5 * norm) : INFINITY;
  }
}

void pack(const float* centers, const float* shift, int64_t num_centers, int64_t width,
          Layout layout, float* panels, float* half_norms) {
  if (layout == Layout::kGrouped) {
    for (int64_t first = 0; first < num_centers; first += kGroup) {
      pack_panel(centers, shift, num_centers, width, first, kGroup, panels + first * width,
                 half_norms + first);
    }
    return;
  }
  for_each_panel(num_centers, [&](int64_t first, int count) {
    pack_panel(centers, shift, num_centers, width, first, count * kLanes, panels + first * width,
               half_norms + first);
  });
}

int64_t padded_centers(int64_t num_centers, Layout layout) {
  return layout == Layout::kGrouped ? num_groups(num_centers) * kGroup
                                    : num_vectors(num_centers) * kLanes;
}

// A block of tokens, and room for their scores.
int64_t scratch_floats(int64_t width, int64_t num_centers) {
  return kRows * (width + num_groups(num_centers) * kGroup);
}

// scores[r][v] = |c|^2 / 2 - x.c: half of the squared distance, less |x|^2 / 2.
template <int kVectors>
void score_panel(const float* const (&rows)[kRows], int64_t width, const float* panel,
                 const float* half_norms, Vec (&scores)[kRows][kMaxVectors],
                 const Upcoming* upcoming = nullptr) {
  Vec dots[kRows][kVectors] = {};
  for (int64_t d = 0; d < width; ++d) {
    if (upcoming != nullptr) upcoming->prefetch(d);
    Vec c[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) c[v] = load(panel + (d * kVectors + v) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec x = rows[r][d] - Vec{};
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
    const Upcoming* upcoming = first == 0 ? &block.upcoming : nullptr;
    Vec scores[kRows][kMaxVectors];
    switch (count) {
      case 1:
        score_panel<1>(block.rows, width, panel, half_norms, scores, upcoming);
        break;
      case 2:
        score_panel<2>(block.rows, width, panel, half_norms, scores, upcoming);
        break;
      default:
        score_panel<3>(block.rows, width, panel, half_norms, scores, upcoming);
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

const auto no_look = [](int64_t, auto&, int) {};

// Lowest score, the lowest index among equals. look(first, scores, v) is shown every vector.
template <class Fn>
Nearest find_nearest(const Block& block, int64_t width, const PackedCenters& centers, Fn look) {
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
      look(first + v * kLanes, scores, v);
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

// Exact but for the addition: a product of two float32 fits into float64.
void add_scaled(const float* __restrict row, double weight, int64_t width, double* __restrict sum) {
  for (int64_t d = 0; d < width; ++d) sum[d] += weight * row[d];
}

void accumulate(const AssignChunk& chunk, int64_t begin, const Block& block,
                const Nearest& nearest) {
  const int64_t width = chunk.tokens.width;
  double inertia = 0.;
  for (int r = 0; r < block.count; ++r) {
    const int64_t m = begin + r;
    const int32_t label = nearest.label[r];
    const float distance = squared_distance(block.norms[r], nearest.score[r]);
    const double weight = chunk.weights ? chunk.weights[m] : 1.f;
    add_scaled(block.rows[r], weight, width, chunk.sums + label * width);
    chunk.counts[label] += weight;
    inertia += weight * distance;
    if (chunk.labels) chunk.labels[m] = label;
    if (chunk.distances) chunk.distances[m] = distance;
  }
  *chunk.inertia += inertia;
}

// ---- Bounds
// ---------------------------------------------------------------------------------------

// More than the rounding of the square root and of the additions to come.
constexpr float kSlack = 1.f / (1 << 22);

float error_of(const TokenBounds& bounds, int64_t m) {
  return bounds.unit_error * (bounds.norms[m] + bounds.largest_norm);
}

float upper_bound(float norm, float score, float error) {
  return std::sqrt(squared_distance(norm, score) + error) * (1.f + kSlack);
}

float lower_bound(float norm, float score, float error) {
  const float squared = squared_distance(norm, score) - error;
  return squared > 0.f ? std::sqrt(squared) * (1.f - kSlack) : 0.f;
}

float lowest_of_group(const float* scores) {
  Vec lowest = load(scores);
  for (int v = 1; v < kGroupVectors; ++v) {
    const Vec other = load(scores + v * kLanes);
    lowest = other < lowest ? other : lowest;
  }
  float lanes[kLanes];
  std::memcpy(lanes, &lowest, sizeof(lanes));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      lanes[lane] = lanes[lane + half] < lanes[lane] ? lanes[lane + half] : lanes[lane];
    }
  }
  return lanes[0];
}

// Writes what is known of a token whose scores [num_groups * kGroup] are all at hand.
void note_bounds(const TokenBounds& bounds, int64_t m, float norm, int32_t label, int64_t groups,
                 float* scores) {
  bounds.norms[m] = norm;
  const float error = error_of(bounds, m);
  bounds.upper[m] = upper_bound(norm, scores[label], error);
  scores[label] = INFINITY;
  for (int64_t g = 0; g < groups; ++g) {
    bounds.lower[m * groups + g] = lower_bound(norm, lowest_of_group(scores + g * kGroup), error);
  }
}

// Takes note of the labels of a block.
void note_labels(const AssignChunk& chunk, int64_t begin, const Block& block,
                 const Nearest& nearest) {
  for (int r = 0; r < block.count; ++r) {
    const int64_t m = begin + r;
    *chunk.changed += chunk.bounds->labels[m] != nearest.label[r];
    *chunk.total += (chunk.weights ? chunk.weights[m] : 1.) * block.norms[r];
    chunk.bounds->labels[m] = nearest.label[r];
  }
}

void assign_with_labels(const AssignChunk& chunk) {
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kRows) {
    const Block block = load_block(chunk.tokens, begin, chunk.end, chunk.scratch);
    const Nearest nearest = find_nearest(block, chunk.tokens.width, chunk.centers, no_look);
    if (chunk.bounds) note_labels(chunk, begin, block, nearest);
    accumulate(chunk, begin, block, nearest);
  }
}

void assign_with_bounds(const AssignChunk& chunk) {
  const int64_t groups = num_groups(chunk.centers.num_centers), stride = groups * kGroup;
  float* all_scores = chunk.scratch + kRows * chunk.tokens.width;
  for (int64_t i = 0; i < kRows * stride; ++i) all_scores[i] = INFINITY;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kRows) {
    const Block block = load_block(chunk.tokens, begin, chunk.end, chunk.scratch);
    const auto keep = [&](int64_t first, auto& scores, int v) {
      for (int r = 0; r < kRows; ++r) {
        std::memcpy(all_scores + r * stride + first, &scores[r][v], sizeof(Vec));
      }
    };
    const Nearest nearest = find_nearest(block, chunk.tokens.width, chunk.centers, keep);
    note_labels(chunk, begin, block, nearest);
    for (int r = 0; r < block.count; ++r) {
      note_bounds(*chunk.bounds, begin + r, block.norms[r], nearest.label[r], groups,
                  all_scores + r * stride);
    }
    accumulate(chunk, begin, block, nearest);
  }
}

void assign(const AssignChunk& chunk) {
  chunk.bounds&& chunk.bounds->upper ? assign_with_bounds(chunk) : assign_with_labels(chunk);
}

// ---- Refine
// ---------------------------------------------------------------------------------------

int64_t tile_rows(int64_t width) {
  const int64_t rows = kTileFloats / width;
  return rows < kRows ? kRows : rows > kMostTileRows ? kMostTileRows : rows;
}

int64_t refine_floats(int64_t width) { return tile_rows(width) * width; }

// Tokens that are read again: what is known of each while the groups are gone through.
class Tile {
 public:
  Tile(const RefineChunk& chunk, const uint16_t* rows, int count)
      : chunk_(chunk), bounds_(chunk.bounds), rows_(rows), count_(count) {
    for (int i = 0; i < count; ++i) {
      load_token(chunk.tokens, row(i), chunk.scratch + i * chunk.tokens.width);
      label_[i] = bounds_.labels[row(i)];
      score_[i] = INFINITY;
    }
  }

  // The own group comes first: it gives the distance that saves most of the others.
  void find_nearest() {
    const int64_t groups = num_groups(chunk_.centers.num_centers);
    for (int64_t g = 0; g < groups; ++g) {
      evaluate_where(g, [&](int i) { return bounds_.labels[row(i)] / kGroup == g; });
    }
    for (int64_t g = 0; g < groups; ++g) {
      evaluate_where(
          g, [&](int i) { return bounds_.labels[row(i)] / kGroup != g && may_hold_nearer(i, g); });
    }
  }

  int64_t write(uint16_t* changed, int32_t* before) {
    int64_t num_changed = 0;
    for (int i = 0; i < count_; ++i) {
      const int64_t m = row(i);
      bounds_.upper[m] = upper_bound(bounds_.norms[m], score_[i], error_of(bounds_, m));
      if (label_[i] == bounds_.labels[m]) continue;
      before[num_changed] = bounds_.labels[m];
      changed[num_changed++] = rows_[i];
      bounds_.labels[m] = label_[i];
    }
    return num_changed;
  }

 private:
  int64_t row(int i) const { return chunk_.begin + rows_[i]; }
  float& lower(int i, int64_t g) {
    return bounds_.lower[row(i) * num_groups(chunk_.centers.num_centers) + g];
  }

  bool may_hold_nearer(int i, int64_t g) {
    const int64_t m = row(i);
    const float error = error_of(bounds_, m);
    return !certainly_farther(lower(i, g), upper_bound(bounds_.norms[m], score_[i], error), error);
  }

  template <class Fn>
  void evaluate_where(int64_t g, Fn wanted) {
    int wanted_rows[kMostTileRows], num_wanted = 0;
    for (int i = 0; i < count_; ++i) {
      if (wanted(i)) wanted_rows[num_wanted++] = i;
    }
    for (int first = 0; first < num_wanted; first += kRows) {
      const int left = num_wanted - first;
      evaluate(g, wanted_rows + first, left < kRows ? left : kRows);
    }
  }

  void evaluate(int64_t g, const int* wanted_rows, int count) {
    const int64_t width = chunk_.tokens.width;
    const float* rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      rows[r] = chunk_.scratch + wanted_rows[r < count ? r : count - 1] * width;
    }
    Vec scores[kRows][kMaxVectors];
    score_panel<kGroupVectors>(rows, width, chunk_.centers.panels + g * kGroup * width,
                               chunk_.centers.half_norms + g * kGroup, scores);
    for (int r = 0; r < count; ++r) {
      float of_group[kGroup];
      std::memcpy(of_group, &scores[r], sizeof(of_group));
      offer(wanted_rows[r], g, of_group);
    }
  }

  // Takes the scores of one group into account.
  void offer(int i, int64_t g, float* scores) {
    const int64_t m = row(i);
    const float norm = bounds_.norms[m], error = error_of(bounds_, m);
    const float lowest = lowest_of_group(scores);
    int lane = 0;
    while (lane < kGroup - 1 && !(scores[lane] == lowest)) ++lane;
    const int32_t candidate = static_cast<int32_t>(g * kGroup + lane);
    const bool wins = lowest < score_[i] || (lowest == score_[i] && candidate < label_[i]);
    if (!wins) {
      lower(i, g) = lower_bound(norm, lowest, error);
      return;
    }
    scores[lane] = INFINITY;
    lower(i, g) = lower_bound(norm, lowest_of_group(scores), error);
    if (score_[i] < INFINITY) {  // a centre of another group was the best so far
      float& others = lower(i, label_[i] / kGroup);
      const float displaced = lower_bound(norm, score_[i], error);
      others = displaced < others ? displaced : others;
    }
    score_[i] = lowest;
    label_[i] = candidate;
  }

  const RefineChunk& chunk_;
  const TokenBounds& bounds_;
  const uint16_t* rows_;
  int count_;
  float score_[kMostTileRows];
  int32_t label_[kMostTileRows];
};

int64_t refine(const RefineChunk& chunk) {
  const int64_t step = tile_rows(chunk.tokens.width);
  int64_t num_changed = 0;
  for (int64_t first = 0; first < chunk.count; first += step) {
    const int64_t left = chunk.count - first;
    Tile tile(chunk, chunk.rows + first, static_cast<int>(left < step ? left : step));
    tile.find_nearest();
    num_changed += tile.write(chunk.changed + num_changed, chunk.before + num_changed);
  }
  return num_changed;
}

void move(const MoveChunk& chunk) {
  GroupTokens part = chunk.tokens;
  const int64_t bytes = element_bytes(part.dtype);
  part.base = static_cast<const char*>(part.base) + chunk.first * bytes;
  part.shift = part.shift ? part.shift + chunk.first : nullptr;
  part.width = chunk.last - chunk.first;
  for (int64_t i = 0; i < chunk.count; ++i) {
    const bool comes = chunk.moves[i] >= 0;
    const int64_t m = comes ? chunk.moves[i] : -chunk.moves[i] - 1;
    const double weight = chunk.weights ? chunk.weights[m] : 1.f;
    load_token(part, m, chunk.scratch);
    add_scaled(chunk.scratch, comes ? weight : -weight, part.width, chunk.sum + chunk.first);
  }
}

// ---- All distances
// --------------------------------------------------------------------------------

void distances(const DistanceChunk& chunk) {
  const int64_t width = chunk.tokens.width;
  const int64_t num_centers = chunk.centers.num_centers;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kRows) {
    const Block block = load_block(chunk.tokens, begin, chunk.end, chunk.scratch);
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
  static const CpuKernels table = {SPT_STRINGIFY(SPT_ISA),
                                   kGroup,
                                   padded_centers,
                                   scratch_floats,
                                   refine_floats,
                                   pack,
                                   assign,
                                   refine,
                                   move,
                                   distances};
  return table;
}

}  // namespace SPT_ISA
}  // namespace spt_fast
