// Passes of Lloyd's algorithm (eq. 9, 10) that leave out the tokens whose centre cannot have
// changed.
//
// Bounds after Hamerly (2010), per group of centres as in Yinyang k-means (Ding et al., 2015). For
// token x of centre a(x), and each group g of 12 or 16 adjacent centres,
//   upper(x) >= |x - a(x)|,   lower(x, g) <= |x - c| for every centre c != a(x) of g.
// When centres move, upper(x) grows by the move of a(x), and lower(x, g) shrinks by the largest
// move in g. While upper(x) < lower(x, g) for every g, the token keeps its centre and is not read.
// A token that fails is read: its own group is scored first, and then the groups that the new upper
// bound does not rule out.
//
// Bounds are of distances between points as the kernels see them: shifted, float32. Each is rounded
// outwards, and a centre is ruled out only where `certainly_farther` holds, that is where the
// scores as *computed* are sure to be in that order. A sum of D products is off by at most D 2^-24
// |x||c|, so a squared distance by less than 2 (D + 16) 2^-24 (|x|^2 + |c|^2). A computed score has
// the same bits in every kernel. So labels are those of the plain pass bit for bit, ties included.
//
// Sums are kept in float64 and corrected by the tokens that change their centre. A product of two
// float32 is exact there, and n corrections are off by at most n 2^-53 of the largest sum on the
// way: 1e-7 of it, float32's own rounding of a centre, after 1e9 of them. A pass that would read
// (almost) everything makes the sums anew. The inertia follows from sums S, counts n and norms, in
// float64: sum_x w |x|^2 + sum_c (n |c|^2 - 2 c . S).
//
// Bounds, norms and labels are kept for all tokens. The tokens themselves come in chunks: before a
// pass the bounds tell which chunks hold a token that must be read. Sums are corrected chunk by
// chunk, in the order of the tokens, however they are cut.
#include <cmath>
#include <cstddef>
#include <stdexcept>

#include "kmeans_cpu_driver.h"
#include "parallel.h"

namespace spt_fast {
namespace {

// A pass reads the tokens that fail their bounds, and twice more those that change, which are about
// as many as in the pass before. Where that is not less than all tokens, all are read once, in
// order.
constexpr double kReadsOfChanged = 2.;

// While more than this fraction of the tokens changes, the next pass will read all tokens as well,
// and bounds would cost more than they save.
constexpr double kWorthBounding = 0.15;

constexpr int64_t kMoveColumns = 256;  // columns of a sum that a thread corrects at a time
// More than the rounding, 2^-24 each, of a square root or an addition and of the product with it.
constexpr float kDriftSlack = 1.f / (1 << 22);

// How far the centres of a group have moved: the largest and the second largest move.
struct GroupDrift {
  float largest = 0.f, second = 0.f;
  int32_t farthest = -1;

  void add(int32_t center, float drift) {
    if (drift > largest) {
      second = largest;
      largest = drift;
      farthest = center;
    } else {
      second = std::max(second, drift);
    }
  }
  float of_others(int32_t center) const { return center == farthest ? second : largest; }
};

// Where a chunk lies among all tokens and all shares.
struct Chunk {
  int64_t first_row, first_share;
  Partition partition;
};

// A chunk that is in memory; pointers and rows count from its first token.
struct LoadedChunk {
  const Chunk& place;
  TokenView view;
  GroupTokens tokens;
  const float* weights;
  TokenBounds bounds;

  double weight(int64_t m) const { return weights ? weights[m] : 1.; }
};

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

class PrunedPasses::State {
 public:
  State(const std::vector<int64_t>& chunk_rows, int64_t width, const float* shift,
        int64_t num_centers, const std::string& isa)
      : kernels_(choose_kernels(isa)),
        num_centers_(num_centers),
        width_(width),
        bound_groups_((num_centers + kernels_.bound_group - 1) / kernels_.bound_group),
        shift_(shift, shift ? shift + width : shift),
        unit_error_(2.f * static_cast<float>(width + 16) / (1 << 24)),
        positions_(num_centers * width),
        sums_(num_centers * width),
        counts_(num_centers),
        chunk_sums_(num_centers * width),
        chunk_counts_(num_centers),
        members_(num_centers) {
    int64_t most_rows = 0;
    for (int64_t rows : chunk_rows) {
      chunks_.push_back({num_rows_, static_cast<int64_t>(share_begins_.size()), {1, rows}});
      for (int64_t share = 0; share < chunks_.back().partition.shares; ++share) {
        share_begins_.push_back(num_rows_ + chunks_.back().partition.begin(share));
      }
      num_rows_ += rows;
      most_rows = std::max(most_rows, rows);
    }
    share_begins_.push_back(num_rows_);
    per_share_.resize(share_begins_.size() - 1);
    labels_.assign(num_rows_, -1);
    norms_.reset(new float[num_rows_]);
    upper_.reset(new float[num_rows_]);
    lower_.reset(new float[num_rows_ * bound_groups_]);
    rows_.reset(new uint16_t[num_rows_]);
    old_labels_.reset(new int32_t[most_rows]);
    last_changed_ = num_rows_;
  }

  const std::vector<int64_t>& begin(const float* centers, int num_threads) {
    const std::vector<float> drifts = place_centers(centers);
    const bool abandoned = !ended_;  // the previous pass did not end, so its sums are not whole
    ended_ = false;
    pass_ = PassReport();
    pass_.read_all = true;
    if (has_bounds_ && !abandoned) {
      pass_.tokens_read = scan(drifts, num_threads);
      pass_.read_all = pass_.tokens_read + kReadsOfChanged * last_changed_ > num_rows_;
    }
    if (pass_.read_all) start_full_read();
    packed_.reset(new PackedGroups(kernels_, centers, shift(), 1, num_centers_, width_,
                                   pass_.read_all ? Layout::kWide : Layout::kGrouped));
    next_ = 0;
    wanted_.clear();
    for (size_t i = 0; i < chunks_.size(); ++i) {
      if (pass_.read_all || holds_failed(chunks_[i])) wanted_.push_back(static_cast<int64_t>(i));
    }
    return wanted_;
  }

  void add(int64_t index, const TokenView& view, const float* weights, int num_threads) {
    require(!ended_ && next_ < wanted_.size() && wanted_[next_] == index,
            "chunks must be added in the order in which begin() lists them");
    const Chunk& chunk = chunks_[index];
    require(view.groups == 1 && view.width == width_ && view.rows() == chunk.partition.rows,
            "tokens must be one group of as many and as wide tokens as the chunk has");
    ++next_;
    const LoadedChunk loaded = {chunk, view, tokens_of_group(view, shift(), 0), weights,
                                bounds_of(chunk)};
    pass_.tokens_changed +=
        pass_.read_all ? assign(loaded, num_threads) : correct(loaded, num_threads);
  }

  PassReport end(double* sums, double* counts) {
    require(!ended_ && next_ == wanted_.size(),
            "all chunks that begin() lists must be added before end()");
    ended_ = true;
    last_changed_ = pass_.tokens_changed;
    write_sums(sums, counts);
    pass_.inertia = inertia();
    return pass_;
  }

  const std::vector<int32_t>& labels() const { return labels_; }

 private:
  const float* shift() const { return shift_.empty() ? nullptr : shift_.data(); }

  TokenBounds bounds_of(const Chunk& chunk) {
    const int64_t first = chunk.first_row;
    TokenBounds bounds;
    bounds.labels = labels_.data() + first;
    bounds.norms = norms_.get() + first;
    bounds.upper = upper_.get() + first;
    bounds.lower = lower_.get() + first * bound_groups_;
    bounds.unit_error = unit_error_;
    bounds.largest_norm = largest_norm_;
    return bounds;
  }

  bool holds_failed(const Chunk& chunk) const {  // a token that failed its bounds
    const auto first = per_share_.begin() + chunk.first_share;
    return std::any_of(first, first + chunk.partition.shares,
                       [](int64_t failed) { return failed > 0; });
  }

  // Stores the new centres; returns an upper bound on how far each has moved.
  std::vector<float> place_centers(const float* centers) {
    std::vector<float> drifts(num_centers_);
    double largest_norm = 0.;
    for (int64_t k = 0; k < num_centers_; ++k) {
      double moved = 0., norm = 0.;
      for (int64_t d = 0; d < width_; ++d) {
        float& position = positions_[k * width_ + d];
        const float next = centers[k * width_ + d] - (shift() ? shift_[d] : 0.f);
        const double step = static_cast<double>(next) - position;
        moved += step * step;
        norm += static_cast<double>(next) * next;
        position = next;
      }
      drifts[k] = static_cast<float>(std::sqrt(moved)) * (1.f + kDriftSlack);
      largest_norm = std::max(largest_norm, norm);
    }
    largest_norm_ = static_cast<float>(largest_norm) * (1.f + kDriftSlack);
    return drifts;
  }

  // Loosens the bounds and lists the tokens that fail them, per share; returns how many do.
  int64_t scan(const std::vector<float>& drifts, int num_threads) {
    std::vector<GroupDrift> groups(bound_groups_);
    for (int64_t k = 0; k < num_centers_; ++k) {
      groups[k / kernels_.bound_group].add(static_cast<int32_t>(k), drifts[k]);
    }
    parallel_for(num_threads, static_cast<int64_t>(per_share_.size()),
                 [&](int64_t share, int) { scan_share(share, drifts, groups); });
    int64_t failed = 0;
    for (int64_t count : per_share_) failed += count;
    return failed;
  }

  void scan_share(int64_t share, const std::vector<float>& drifts,
                  const std::vector<GroupDrift>& groups) {
    const int64_t begin = share_begins_[share], end = share_begins_[share + 1];
    int64_t failed = 0;
    for (int64_t m = begin; m < end; ++m) {
      const int32_t label = labels_[m];
      const float upper = (upper_[m] + drifts[label]) * (1.f + kDriftSlack);
      float nearest_other = INFINITY;
      for (int64_t g = 0; g < bound_groups_; ++g) {
        float& lower = lower_[m * bound_groups_ + g];
        lower = std::max(0.f, (lower - groups[g].of_others(label)) * (1.f - kDriftSlack));
        nearest_other = std::min(nearest_other, lower);
      }
      upper_[m] = upper;
      const float error = unit_error_ * (norms_[m] + largest_norm_);
      rows_[begin + failed] = static_cast<uint16_t>(m - begin);
      failed += !certainly_farther(nearest_other, upper, error);
    }
    per_share_[share] = failed;
  }

  // All tokens will be read, and sums made anew; bounds too, if they are worth it by now.
  void start_full_read() {
    pass_.tokens_read = num_rows_;
    has_bounds_ = last_changed_ <= kWorthBounding * num_rows_;
    std::fill(sums_.begin(), sums_.end(), 0.);
    std::fill(counts_.begin(), counts_.end(), 0.);
    std::fill(members_.begin(), members_.end(), 0);
    weighted_norms_ = 0.;
  }

  // Reads all of a chunk. Returns how many labels changed.
  int64_t assign(const LoadedChunk& chunk, int num_threads) {
    AssignArgs args;
    double inertia;
    args.tokens = chunk.view;
    args.shift = shift();
    args.weights = chunk.weights;
    args.num_centers = num_centers_;
    args.sums = chunk_sums_.data();
    args.counts = chunk_counts_.data();
    args.inertia = &inertia;
    PrunedOutputs outputs;
    outputs.bounds = chunk.bounds;
    if (!has_bounds_) outputs.bounds.upper = nullptr;
    assign_pass(args, kernels_, *packed_, num_threads, &outputs);
    for (size_t i = 0; i < sums_.size(); ++i) sums_[i] += chunk_sums_[i];
    for (int64_t k = 0; k < num_centers_; ++k) counts_[k] += chunk_counts_[k];
    for (int64_t m = 0; m < chunk.view.rows(); ++m) {
      members_[chunk.bounds.labels[m]] += chunk.weight(m) > 0.;
    }
    weighted_norms_ += outputs.weighted_norms;
    return outputs.num_changed;
  }

  // Reads the tokens of a chunk that failed, and corrects the sums. Returns how many labels
  // changed.
  int64_t correct(const LoadedChunk& chunk, int num_threads) {
    const Chunk& place = chunk.place;
    const Partition& partition = place.partition;
    if (static_cast<int>(scratch_.size()) < useful_threads(num_threads, partition.shares)) {
      scratch_.resize(useful_threads(num_threads, partition.shares),
                      std::vector<float>(kernels_.refine_floats(width_)));
    }
    parallel_for(num_threads, partition.shares, [&](int64_t share, int thread) {
      const int64_t begin = partition.begin(share);
      int64_t& count = per_share_[place.first_share + share];
      uint16_t* rows = rows_.get() + place.first_row + begin;
      count = kernels_.refine({chunk.tokens, packed_->group(0), begin, rows, count, chunk.bounds,
                               scratch_[thread].data(), rows, old_labels_.get() + begin});
    });
    return correct_sums(chunk, num_threads);
  }

  // Corrects each centre's sum in the order of the tokens, whatever the number of threads.
  int64_t correct_sums(const LoadedChunk& chunk, int num_threads) {
    const Chunk& place = chunk.place;
    std::vector<std::vector<int64_t>> moves(num_centers_);
    int64_t changed = 0;
    for (int64_t share = 0; share < place.partition.shares; ++share) {
      const int64_t begin = place.partition.begin(share);
      const uint16_t* rows = rows_.get() + place.first_row + begin;
      const int64_t count = per_share_[place.first_share + share];
      changed += count;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t m = begin + rows[i];
        const int32_t left = old_labels_[begin + i], joined = chunk.bounds.labels[m];
        moves[left].push_back(-m - 1);
        moves[joined].push_back(m);
        count_move(left, chunk.weight(m), -1);
        count_move(joined, chunk.weight(m), 1);
      }
    }
    const int64_t strips = (width_ + kMoveColumns - 1) / kMoveColumns;
    std::vector<std::vector<float>> scratch(useful_threads(num_threads, num_centers_ * strips),
                                            std::vector<float>(kMoveColumns));
    parallel_for(num_threads, num_centers_ * strips, [&](int64_t task, int thread) {
      const int64_t k = task / strips, first = task % strips * kMoveColumns;
      kernels_.move({chunk.tokens, moves[k].data(), static_cast<int64_t>(moves[k].size()), first,
                     std::min(width_, first + kMoveColumns), chunk.weights, scratch[thread].data(),
                     sums_.data() + k * width_});
    });
    return changed;
  }

  void count_move(int32_t center, double weight, int sign) {
    counts_[center] += sign * weight;
    members_[center] += weight > 0. ? sign : 0;
  }

  // A centre that lost its last token has sums of exactly zero, whatever corrections left there.
  void write_sums(double* sums, double* counts) {
    for (int64_t k = 0; k < num_centers_; ++k) {
      double* sum = sums_.data() + k * width_;
      if (members_[k] == 0) {
        counts_[k] = 0.;
        std::fill(sum, sum + width_, 0.);
      }
      counts[k] = counts_[k];
      for (int64_t d = 0; d < width_; ++d) {
        sums[k * width_ + d] = sum[d] + (shift() ? counts_[k] * shift_[d] : 0.);
      }
    }
  }

  double inertia() const {
    double total = weighted_norms_;
    for (int64_t k = 0; k < num_centers_; ++k) {
      double product = 0., norm = 0.;
      for (int64_t d = 0; d < width_; ++d) {
        const double position = positions_[k * width_ + d];
        product += position * sums_[k * width_ + d];
        norm += position * position;
      }
      total += counts_[k] * norm - 2. * product;
    }
    return total < 0. ? 0. : total;  // NaN is kept
  }

  const CpuKernels& kernels_;
  const int64_t num_centers_, width_, bound_groups_;
  const std::vector<float> shift_;  // [D], or empty: zero
  const float unit_error_;          // of TokenBounds
  float largest_norm_ = 0.f;        // of TokenBounds

  int64_t num_rows_ = 0;  // M, of all chunks
  std::vector<Chunk> chunks_;
  std::vector<int64_t> share_begins_;  // first token of each share of each chunk, and M

  std::vector<int32_t> labels_;                     // [M]
  std::unique_ptr<float[]> norms_, upper_, lower_;  // [M], [M], [M, bound_groups]: TokenBounds
  std::unique_ptr<uint16_t[]> rows_;  // of each share: rows that failed, then those that changed
  std::unique_ptr<int32_t[]> old_labels_;  // of each share of one chunk: centres that these had
  std::vector<int64_t> per_share_;         // how many rows these are
  std::vector<float> positions_;           // [K, D] centres of the last pass, shifted
  std::vector<double> sums_, counts_;      // [K, D] shifted, [K]
  std::vector<double> chunk_sums_, chunk_counts_;  // of one chunk
  std::vector<int64_t> members_;                   // [K] tokens with a weight above zero
  double weighted_norms_ = 0.;                     // sum over all tokens
  std::vector<std::vector<float>> scratch_;        // per thread

  int64_t last_changed_ = 0;  // labels that the last pass changed
  bool has_bounds_ = false;   // the bounds hold for the centres of the last pass

  PassReport pass_;  // of the pass that has begun, or of the last one
  std::unique_ptr<PackedGroups> packed_;
  std::vector<int64_t> wanted_;  // chunks that the pass has to read
  size_t next_ = 0;              // how many of these were added
  bool ended_ = true;
};

PrunedPasses::PrunedPasses(const std::vector<int64_t>& chunk_rows, int64_t width,
                           const float* shift, int64_t num_centers, const std::string& isa)
    : state_(new State(chunk_rows, width, shift, num_centers, isa)) {}

PrunedPasses::~PrunedPasses() = default;

const std::vector<int64_t>& PrunedPasses::begin(const float* centers, int num_threads) {
  return state_->begin(centers, num_threads);
}

void PrunedPasses::add(int64_t chunk, const TokenView& tokens, const float* weights,
                       int num_threads) {
  state_->add(chunk, tokens, weights, num_threads);
}

PassReport PrunedPasses::end(double* sums, double* counts) { return state_->end(sums, counts); }

const std::vector<int32_t>& PrunedPasses::labels() const { return state_->labels(); }

}  // namespace spt_fast
