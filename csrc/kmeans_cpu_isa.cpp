// The k-means kernels for one instruction set; compiled once for each, with SPT_ISA naming it.
//
// Equations are those of the paper: eq. 9 assigns each token to its nearest centre, eq. 10 makes
// each centre the mean of its tokens. The nearest centre c of token x has the lowest score
//   |c|^2 / 2 - x . c = |x - c|^2 / 2 - |x|^2 / 2,
// where x and c are shifted float32 values.
//
// A tile of kRows tokens is widened to float32, shifted and kept in L1. Its products with the
// centres are a small matrix product: a token's value is broadcast, the values of several centres
// are one vector of a panel, and the sums stay in registers over the whole width. The same tile is
// then added to the sums of its nearest centres, so that a token is read from memory once. A score
// has the same bits in every panel and every tile; therefore pruning changes no label. No function
// template of the standard library is used here: the linker would share its code with objects
// built for older processors.
#include "kmeans_cpu_isa.h"

#include <cmath>
#include <cstring>

namespace spt_fast {
namespace SPT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRows = 8;  // 8 x 3 sums and 3 vectors of a panel fit the 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRows = 4;  // 4 x 3 sums and 3 vectors of a panel fit the 16 registers
#else
constexpr int kLanes = 4;  // SSE2, NEON
constexpr int kRows = 4;
#endif
constexpr int kCacheLine = 64;
constexpr int kMaxVectors = 3;  // of a panel: as many as the registers hold, see kRows

// Centres that share a lower bound: 16, or 12 where a panel holds no more.
constexpr int kGroupVectors = kLanes == 4 ? 3 : 16 / kLanes;
constexpr int kGroup = kGroupVectors * kLanes;

// Tokens that are refined together, at most, and their floats: 256 KiB, which stay in L2 until the
// last group of centres is done.
constexpr int kMostRefined = 64;
constexpr int64_t kRefinedFloats = 65536;

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

// Tokens as they lie in memory, fetched into the cache while others are scored. Without that the
// processor waits for every tile: a pass takes 1.1 (K = 100) to 1.4 times (K = 5) as long.
struct Upcoming {
  const char* rows[kRows];
  int64_t bytes;  // of an element

  // Fetches the cache lines that start at column d; to be called for every d.
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

// A tile of up to kRows widened tokens; rows from `count` on repeat the last one.
struct Tile {
  const float* rows[kRows];
  float norms[kRows];
  int count;
  Upcoming upcoming;  // the tile that follows
};

Tile load_tile(const GroupTokens& tokens, int64_t begin, int64_t end, float* scratch) {
  Tile tile;
  tile.count = end - begin < kRows ? static_cast<int>(end - begin) : kRows;
  tile.upcoming = upcoming_tokens(tokens, begin + kRows, end);
  for (int r = 0; r < kRows; ++r) {
    if (r >= tile.count) {
      tile.rows[r] = tile.rows[r - 1];
      tile.norms[r] = tile.norms[r - 1];
      continue;
    }
    float* row = scratch + r * tokens.width;
    load_token(tokens, begin + r, row);
    tile.rows[r] = row;
    tile.norms[r] = squared_norm(row, tokens.width);
  }
  return tile;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t num_vectors(int64_t num_centers) { return divide_up(num_centers, kLanes); }

int64_t num_groups(int64_t num_centers) { return divide_up(num_centers, kGroup); }

// fn(first centre, number of vectors) for each panel. Panels are as even as can be: 4 vectors make
// two panels of 2, not one of 3 and one of 1.
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

// panel [D, columns]: for each d, the d-th elements of the centres [first, first + columns),
// shifted; half_norms [columns]: |c - shift|^2 / 2. Padding is zero, at an infinite half norm.
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

// Floats of a tile of tokens, and of their scores.
int64_t scratch_floats(int64_t width, int64_t num_centers) {
  return kRows * (width + num_groups(num_centers) * kGroup);
}

// scores[r][v] = |c|^2 / 2 - x . c, for the tokens x of a tile and the centres c of a panel: lane l
// of vector v is centre v * kLanes + l of the panel. IN rows [kRows, D], panel [D, kVectors *
// kLanes], half_norms [kVectors * kLanes].
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
void for_each_score_panel(const Tile& tile, int64_t width, const PackedCenters& centers, Fn fn) {
  for_each_panel(centers.num_centers, [&](int64_t first, int count) {
    const float* panel = centers.panels + first * width;
    const float* half_norms = centers.half_norms + first;
    const Upcoming* upcoming = first == 0 ? &tile.upcoming : nullptr;
    Vec scores[kRows][kMaxVectors];
    switch (count) {
      case 1:
        score_panel<1>(tile.rows, width, panel, half_norms, scores, upcoming);
        break;
      case 2:
        score_panel<2>(tile.rows, width, panel, half_norms, scores, upcoming);
        break;
      default:
        score_panel<3>(tile.rows, width, panel, half_norms, scores, upcoming);
    }
    fn(first, count, scores);
  });
}

// |x - c|^2 = |x|^2 + 2 score. NaN is kept: it tells the caller of a token that is not finite.
float squared_distance(float norm, float score) {
  const float value = norm + 2.f * score;
  return value < 0.f ? 0.f : value;
}

struct Nearest {
  float score[kRows];
  int32_t label[kRows];
};

IntVec lane_numbers() {
  IntVec lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

const auto see_nothing = [](int64_t, auto&, int) {};

// The lowest score of each token, and its centre; of equal scores the lowest centre. Every vector
// of scores goes to see(first centre, scores, v) on the way.
template <class Fn>
Nearest find_nearest(const Tile& tile, int64_t width, const PackedCenters& centers, Fn see) {
  Vec best[kRows];
  IntVec label[kRows];
  for (int r = 0; r < kRows; ++r) {
    best[r] = INFINITY - Vec{};
    label[r] = IntVec{};
  }
  const IntVec lanes = lane_numbers();
  for_each_score_panel(tile, width, centers, [&](int64_t first, int count, auto& scores) {
    for (int v = 0; v < count; ++v) {
      const IntVec candidates = lanes + static_cast<int32_t>(first + v * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vec score = scores[r][v];
        label[r] = score < best[r] ? candidates : label[r];
        best[r] = score < best[r] ? score : best[r];
      }
      see(first + v * kLanes, scores, v);
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

// sum += weight * row, both [D]. Exact but for the addition: a product of two float32 fits float64.
void add_scaled(const float* __restrict row, double weight, int64_t width, double* __restrict sum) {
  for (int64_t d = 0; d < width; ++d) sum[d] += weight * row[d];
}

// sums[c] += w x, counts[c] += w, inertia += w |x - c|^2 for the tokens x of a tile, of weight w
// and nearest centre c.
void accumulate(const AssignShare& share, int64_t begin, const Tile& tile, const Nearest& nearest) {
  const int64_t width = share.tokens.width;
  double inertia = 0.;
  for (int r = 0; r < tile.count; ++r) {
    const int64_t m = begin + r;
    const int32_t label = nearest.label[r];
    const float distance = squared_distance(tile.norms[r], nearest.score[r]);
    const double weight = share.weights ? share.weights[m] : 1.f;
    add_scaled(tile.rows[r], weight, width, share.sums + label * width);
    share.counts[label] += weight;
    inertia += weight * distance;
    if (share.labels) share.labels[m] = label;
    if (share.distances) share.distances[m] = distance;
  }
  *share.inertia += inertia;
}

// More than the rounding of a square root, a product and the additions that follow: 2^-24 each.
constexpr float kSlack = 1.f / (1 << 22);

// Bound on the error of a squared distance of token m.
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

// Writes the bounds of token m from its scores [groups * kGroup], of which its own centre's is
// overwritten.
void write_bounds(const TokenBounds& bounds, int64_t m, float norm, int32_t label, int64_t groups,
                  float* scores) {
  bounds.norms[m] = norm;
  const float error = error_of(bounds, m);
  bounds.upper[m] = upper_bound(norm, scores[label], error);
  scores[label] = INFINITY;
  for (int64_t g = 0; g < groups; ++g) {
    bounds.lower[m * groups + g] = lower_bound(norm, lowest_of_group(scores + g * kGroup), error);
  }
}

// Writes the labels of a tile, counts those that are new, and adds its norms up.
void write_labels(const AssignShare& share, int64_t begin, const Tile& tile,
                  const Nearest& nearest) {
  for (int r = 0; r < tile.count; ++r) {
    const int64_t m = begin + r;
    *share.num_changed += share.bounds->labels[m] != nearest.label[r];
    *share.weighted_norms += (share.weights ? share.weights[m] : 1.) * tile.norms[r];
    share.bounds->labels[m] = nearest.label[r];
  }
}

void assign_with_labels(const AssignShare& share) {
  for (int64_t begin = share.begin; begin < share.end; begin += kRows) {
    const Tile tile = load_tile(share.tokens, begin, share.end, share.scratch);
    const Nearest nearest = find_nearest(tile, share.tokens.width, share.centers, see_nothing);
    if (share.bounds) write_labels(share, begin, tile, nearest);
    accumulate(share, begin, tile, nearest);
  }
}

void assign_with_bounds(const AssignShare& share) {
  const int64_t groups = num_groups(share.centers.num_centers), stride = groups * kGroup;
  float* all_scores = share.scratch + kRows * share.tokens.width;
  for (int64_t i = 0; i < kRows * stride; ++i) all_scores[i] = INFINITY;
  for (int64_t begin = share.begin; begin < share.end; begin += kRows) {
    const Tile tile = load_tile(share.tokens, begin, share.end, share.scratch);
    const auto keep = [&](int64_t first, auto& scores, int v) {
      for (int r = 0; r < kRows; ++r) {
        std::memcpy(all_scores + r * stride + first, &scores[r][v], sizeof(Vec));
      }
    };
    const Nearest nearest = find_nearest(tile, share.tokens.width, share.centers, keep);
    write_labels(share, begin, tile, nearest);
    for (int r = 0; r < tile.count; ++r) {
      write_bounds(*share.bounds, begin + r, tile.norms[r], nearest.label[r], groups,
                   all_scores + r * stride);
    }
    accumulate(share, begin, tile, nearest);
  }
}

// Assign and accumulate (eq. 9, 10): label(x) = argmin_c |x - c|^2, sums[c] = the weighted sum of
// the tokens x with label c, counts[c] = the sum of their weights. Shapes are in AssignShare.
void assign(const AssignShare& share) {
  if (share.bounds && share.bounds->upper) {
    assign_with_bounds(share);
  } else {
    assign_with_labels(share);
  }
}

int64_t refined_at_once(int64_t width) {
  const int64_t rows = kRefinedFloats / width;
  return rows < kRows ? kRows : rows > kMostRefined ? kMostRefined : rows;
}

int64_t refine_floats(int64_t width) { return refined_at_once(width) * width; }

// Tokens whose bounds have failed: each is scored group by group until no other group can hold a
// nearer centre.
class RefinedTokens {
 public:
  RefinedTokens(const RefineShare& share, const uint16_t* rows, int count)
      : share_(share), bounds_(share.bounds), rows_(rows), count_(count) {
    for (int i = 0; i < count; ++i) {
      load_token(share.tokens, row(i), share.scratch + i * share.tokens.width);
      label_[i] = bounds_.labels[row(i)];
      score_[i] = INFINITY;
    }
  }

  // A token's own group comes first: its distance rules most of the other groups out.
  void find_nearest() {
    const int64_t groups = num_groups(share_.centers.num_centers);
    for (int64_t g = 0; g < groups; ++g) {
      evaluate_where(g, [&](int i) { return bounds_.labels[row(i)] / kGroup == g; });
    }
    for (int64_t g = 0; g < groups; ++g) {
      evaluate_where(
          g, [&](int i) { return bounds_.labels[row(i)] / kGroup != g && may_hold_nearer(i, g); });
    }
  }

  // Writes upper bounds and labels. Returns how many labels are new; OUT their rows and old labels.
  int64_t write(uint16_t* changed_rows, int32_t* old_labels) {
    int64_t num_changed = 0;
    for (int i = 0; i < count_; ++i) {
      const int64_t m = row(i);
      bounds_.upper[m] = upper_bound(bounds_.norms[m], score_[i], error_of(bounds_, m));
      if (label_[i] == bounds_.labels[m]) continue;
      old_labels[num_changed] = bounds_.labels[m];
      changed_rows[num_changed++] = rows_[i];
      bounds_.labels[m] = label_[i];
    }
    return num_changed;
  }

 private:
  int64_t row(int i) const { return share_.begin + rows_[i]; }
  float& lower(int i, int64_t g) {
    return bounds_.lower[row(i) * num_groups(share_.centers.num_centers) + g];
  }

  bool may_hold_nearer(int i, int64_t g) {
    const int64_t m = row(i);
    const float error = error_of(bounds_, m);
    return !certainly_farther(lower(i, g), upper_bound(bounds_.norms[m], score_[i], error), error);
  }

  template <class Fn>
  void evaluate_where(int64_t g, Fn wanted) {
    int wanted_rows[kMostRefined], num_wanted = 0;
    for (int i = 0; i < count_; ++i) {
      if (wanted(i)) wanted_rows[num_wanted++] = i;
    }
    for (int first = 0; first < num_wanted; first += kRows) {
      const int left = num_wanted - first;
      evaluate(g, wanted_rows + first, left < kRows ? left : kRows);
    }
  }

  void evaluate(int64_t g, const int* wanted_rows, int count) {
    const int64_t width = share_.tokens.width;
    const float* rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      rows[r] = share_.scratch + wanted_rows[r < count ? r : count - 1] * width;
    }
    Vec scores[kRows][kMaxVectors];
    score_panel<kGroupVectors>(rows, width, share_.centers.panels + g * kGroup * width,
                               share_.centers.half_norms + g * kGroup, scores);
    for (int r = 0; r < count; ++r) {
      float of_group[kGroup];
      std::memcpy(of_group, &scores[r], sizeof(of_group));
      offer(wanted_rows[r], g, of_group);
    }
  }

  // Updates token i by its scores [kGroup] in group g, of which the lowest is overwritten if it
  // wins.
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
    if (score_[i] < INFINITY) {  // the centre of another group is displaced
      float& others = lower(i, label_[i] / kGroup);
      const float displaced = lower_bound(norm, score_[i], error);
      others = displaced < others ? displaced : others;
    }
    score_[i] = lowest;
    label_[i] = candidate;
  }

  const RefineShare& share_;
  const TokenBounds& bounds_;
  const uint16_t* rows_;
  int count_;
  float score_[kMostRefined];
  int32_t label_[kMostRefined];
};

// Assign (eq. 9) for tokens that have bounds: groups of centres whose lower bound is above the
// upper bound of the token's distance are not scored. Shapes are in RefineShare.
int64_t refine(const RefineShare& share) {
  const int64_t step = refined_at_once(share.tokens.width);
  int64_t num_changed = 0;
  for (int64_t first = 0; first < share.count; first += step) {
    const int64_t left = share.count - first;
    RefinedTokens tokens(share, share.rows + first, static_cast<int>(left < step ? left : step));
    tokens.find_nearest();
    num_changed += tokens.write(share.changed_rows + num_changed, share.old_labels + num_changed);
  }
  return num_changed;
}

// Corrects a sum of eq. 10: sum += w x for each token x that joins the centre, sum -= w x for each
// that leaves it, in order. Shapes are in MoveShare.
void move(const MoveShare& share) {
  GroupTokens columns = share.tokens;
  const int64_t bytes = element_bytes(columns.dtype);
  columns.base = static_cast<const char*>(columns.base) + share.first * bytes;
  columns.shift = columns.shift ? columns.shift + share.first : nullptr;
  columns.width = share.last - share.first;
  for (int64_t i = 0; i < share.count; ++i) {
    const bool joins = share.moves[i] >= 0;
    const int64_t m = joins ? share.moves[i] : -share.moves[i] - 1;
    const double weight = share.weights ? share.weights[m] : 1.f;
    load_token(columns, m, share.scratch);
    add_scaled(share.scratch, joins ? weight : -weight, columns.width, share.sum + share.first);
  }
}

// distances[m, k] = |x_m - c_k|^2. Shapes are in DistanceShare.
void distances(const DistanceShare& share) {
  const int64_t width = share.tokens.width;
  const int64_t num_centers = share.centers.num_centers;
  for (int64_t begin = share.begin; begin < share.end; begin += kRows) {
    const Tile tile = load_tile(share.tokens, begin, share.end, share.scratch);
    for_each_score_panel(tile, width, share.centers, [&](int64_t first, int count, auto& scores) {
      for (int r = 0; r < tile.count; ++r) {
        float* out = share.distances + (begin + r) * num_centers;
        for (int c = 0; c < count * kLanes && first + c < num_centers; ++c) {
          out[first + c] = squared_distance(tile.norms[r], scores[r][c / kLanes][c % kLanes]);
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
