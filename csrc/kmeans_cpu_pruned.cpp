// Passes of Lloyd's algorithm that leave out the tokens whose centre cannot have changed.
//
// Bounds after Hamerly (2010), per group of centres as in Yinyang k-means (Ding et al., 2015):
// `upper` is at least a token's distance to its centre, `lower` at most its distance to every other
// centre of a group of 12 or 16 adjacent ones. When centres move, `upper` grows by what the token's
// own centre moved, and `lower` shrinks by the largest move in the group. As long as `upper` stays
// below `lower` for every group, the token keeps its centre and is not read; else it is read, its
// own group is scored, and then those groups that the new, tight `upper` does not rule out.
//
// Bounds are of the distances between points as the kernels see them (shifted, float32). Each is
// rounded outwards, and a centre is ruled out only where `certainly_farther` holds: where the
// scores as *computed* are sure to be in that order. D products accumulated in turn are off by at
// most D * 2^-24 * |x||c|, so a squared distance by less than 2 (D + 16) 2^-24 (|x|^2 + |c|^2). And
// a score that is computed has the same bits in every kernel. So labels are those of the plain pass
// bit for bit, ties included.
//
// Sums are kept in float64 and corrected by the tokens that change their centre: a product of two
// float32 is exact there, and n corrections are off by n * 2^-53 of the largest sum on the way,
// which is 1e-7 of it, float32's own rounding of a centre, after 1e9 of them. A pass that reads
// (almost) everything anyway makes them anew. The inertia follows from sums, counts and norms:
// sum w|x|^2 - 2 c.S + n|c|^2, in float64.
//
// Bounds, norms and labels are kept for all tokens, which themselves come in parts: the bounds tell
// before a pass which parts hold a token that must be read. What is read is corrected for, part by
// part, so that the order of the tokens is the order of the corrections, however they are cut.
#include <cmath>
#include <cstddef>
#include <stdexcept>

#include "kmeans_cpu_driver.h"
#include "parallel.h"

namespace spt_fast {
namespace {

// A pass reads the tokens that fail their bounds, and those that change twice more (about as many
// as in the pass before). Where that is not less than all tokens, everything is read once, in
// order.
constexpr double kReadsOfChanged = 2.;

// While more tokens change than this share, the next pass will read everything as well, and bounds
// are not worth their while.
constexpr double kWorthBounding = 0.15;

constexpr int64_t kMoveColumns = 256;           // columns of a sum that one task corrects
constexpr float kDriftSlack = 1.f / (1 << 22);  // more than the rounding of one addition

// The largest and second largest move of the centres of a group.
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

// Where a part lies among all tokens and all chunks.
struct Part {
  int64_t first_row, first_chunk;
  Partition partition;
};

// A part that is at hand; everything counts from its first token.
struct LoadedPart {
  TokenView view;
  GroupTokens tokens;
  const float* weights;
  TokenBounds bounds;

  double weight(int64_t m) const { return weights ? weights[m] : 1.f; }
};

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

class PrunedPasses::State {
 public:
  State(const std::vector<int64_t>& part_rows, int64_t width, const float* shift,
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
        part_sums_(num_centers * width),
        part_counts_(num_centers),
        members_(num_centers) {
    int64_t most_rows = 0;
    for (int64_t rows : part_rows) {
      parts_.push_back({num_rows_, static_cast<int64_t>(chunk_begins_.size()), {1, rows}});
      for (int64_t chunk = 0; chunk < parts_.back().partition.chunks; ++chunk) {
        chunk_begins_.push_back(num_rows_ + parts_.back().partition.begin(chunk));
      }
      num_rows_ += rows;
      most_rows = std::max(most_rows, rows);
    }
    chunk_begins_.push_back(num_rows_);
    per_chunk_.resize(chunk_begins_.size() - 1);
    labels_.assign(num_rows_, -1);
    norms_.reset(new float[num_rows_]);
    upper_.reset(new float[num_rows_]);
    lower_.reset(new float[num_rows_ * bound_groups_]);
    rows_.reset(new uint16_t[num_rows_]);
    before_.reset(new int32_t[most_rows]);
    last_changed_ = num_rows_;
  }

  const std::vector<int64_t>& begin(const float* centers, int num_threads) {
    const std::vector<float> drifts = place_centers(centers);
    const bool abandoned = !ended_;  // the sums of the pass before are not whole
    ended_ = false;
    pass_ = PassReport();
    pass_.read_all = true;
    if (bounded_ && !abandoned) {
      pass_.tokens_read = scan(drifts, num_threads);
      pass_.read_all = pass_.tokens_read + kReadsOfChanged * last_changed_ > num_rows_;
    }
    if (pass_.read_all) start_afresh();
    packed_.reset(new PackedGroups(kernels_, centers, shift(), 1, num_centers_, width_,
                                   pass_.read_all ? Layout::kWide : Layout::kGrouped));
    next_ = 0;
    wanted_.clear();
    for (size_t p = 0; p < parts_.size(); ++p) {
      if (pass_.read_all || holds_failed(parts_[p])) wanted_.push_back(static_cast<int64_t>(p));
    }
    return wanted_;
  }

  void add(int64_t index, const TokenView& view, const float* weights, int num_threads) {
    require(!ended_ && next_ < wanted_.size() && wanted_[next_] == index,
            "parts must be added in the order in which begin() lists them");
    const Part& part = parts_[index];
    require(view.groups == 1 && view.width == width_ && view.rows() == part.partition.rows,
            "tokens must be one group of as many and as wide tokens as the part has");
    ++next_;
    const LoadedPart loaded = {view, tokens_of_group(view, shift(), 0), weights, bounds_of(part)};
    pass_.tokens_changed +=
        pass_.read_all ? assign(loaded, num_threads) : correct(part, loaded, num_threads);
  }

  PassReport end(double* sums, double* counts) {
    require(!ended_ && next_ == wanted_.size(),
            "all parts that begin() lists must be added before end()");
    ended_ = true;
    last_changed_ = pass_.tokens_changed;
    write_sums(sums, counts);
    pass_.inertia = inertia();
    return pass_;
  }

  const std::vector<int32_t>& labels() const { return labels_; }

 private:
  const float* shift() const { return shift_.empty() ? nullptr : shift_.data(); }

  TokenBounds bounds_of(const Part& part) {
    const int64_t first = part.first_row;
    TokenBounds bounds;
    bounds.labels = labels_.data() + first;
    bounds.norms = norms_.get() + first;
    bounds.upper = upper_.get() + first;
    bounds.lower = lower_.get() + first * bound_groups_;
    bounds.unit_error = unit_error_;
    bounds.largest_norm = largest_norm_;
    return bounds;
  }

  bool holds_failed(const Part& part) const {
    const auto first = per_chunk_.begin() + part.first_chunk;
    return std::any_of(first, first + part.partition.chunks,
                       [](int64_t failed) { return failed > 0; });
  }

  // Takes the new centres in; returns how far each has moved at most.
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

  // Loosens the bounds and lists the tokens of each chunk that fail them; returns how many do.
  int64_t scan(const std::vector<float>& drifts, int num_threads) {
    std::vector<GroupDrift> groups(bound_groups_);
    for (int64_t k = 0; k < num_centers_; ++k) {
      groups[k / kernels_.bound_group].add(static_cast<int32_t>(k), drifts[k]);
    }
    parallel_for(num_threads, static_cast<int64_t>(per_chunk_.size()),
                 [&](int64_t chunk, int) { scan_chunk(chunk, drifts, groups); });
    int64_t failed = 0;
    for (int64_t count : per_chunk_) failed += count;
    return failed;
  }

  void scan_chunk(int64_t chunk, const std::vector<float>& drifts,
                  const std::vector<GroupDrift>& groups) {
    const int64_t begin = chunk_begins_[chunk], end = chunk_begins_[chunk + 1];
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
    per_chunk_[chunk] = failed;
  }

  // Everything is read: labels, bounds and sums will be new.
  void start_afresh() {
    pass_.tokens_read = num_rows_;
    bounded_ = last_changed_ <= kWorthBounding * num_rows_;
    std::fill(sums_.begin(), sums_.end(), 0.);
    std::fill(counts_.begin(), counts_.end(), 0.);
    std::fill(members_.begin(), members_.end(), 0);
    total_ = 0.;
  }

  // Reads all of a part. Returns how many labels changed.
  int64_t assign(const LoadedPart& part, int num_threads) {
    AssignArgs args;
    double inertia;
    args.tokens = part.view;
    args.shift = shift();
    args.weights = part.weights;
    args.num_centers = num_centers_;
    args.sums = part_sums_.data();
    args.counts = part_counts_.data();
    args.inertia = &inertia;
    BoundedPass pass;
    pass.bounds = part.bounds;
    if (!bounded_) pass.bounds.upper = nullptr;
    assign_pass(args, kernels_, *packed_, num_threads, &pass);
    for (size_t i = 0; i < sums_.size(); ++i) sums_[i] += part_sums_[i];
    for (int64_t k = 0; k < num_centers_; ++k) counts_[k] += part_counts_[k];
    for (int64_t m = 0; m < part.view.rows(); ++m) {
      members_[part.bounds.labels[m]] += part.weight(m) > 0.;
    }
    total_ += pass.total;
    return pass.changed;
  }

  // Reads the tokens of a part that failed, and corrects the sums. Returns how many labels changed.
  int64_t correct(const Part& place, const LoadedPart& part, int num_threads) {
    const Partition& partition = place.partition;
    if (static_cast<int>(scratch_.size()) < useful_threads(num_threads, partition.chunks)) {
      scratch_.resize(useful_threads(num_threads, partition.chunks),
                      std::vector<float>(kernels_.refine_floats(width_)));
    }
    parallel_for(num_threads, partition.chunks, [&](int64_t chunk, int thread) {
      const int64_t begin = partition.begin(chunk);
      int64_t& count = per_chunk_[place.first_chunk + chunk];
      uint16_t* rows = rows_.get() + place.first_row + begin;
      count = kernels_.refine({part.tokens, packed_->group(0), begin, rows, count, part.bounds,
                               scratch_[thread].data(), rows, before_.get() + begin});
    });
    return correct_sums(place, part, num_threads);
  }

  // Moves by centre, in the order of the tokens whatever the number of threads.
  int64_t correct_sums(const Part& place, const LoadedPart& part, int num_threads) {
    std::vector<std::vector<int64_t>> moves(num_centers_);
    int64_t changed = 0;
    for (int64_t chunk = 0; chunk < place.partition.chunks; ++chunk) {
      const int64_t begin = place.partition.begin(chunk);
      const uint16_t* rows = rows_.get() + place.first_row + begin;
      const int64_t count = per_chunk_[place.first_chunk + chunk];
      changed += count;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t m = begin + rows[i];
        const int32_t before = before_[begin + i], label = part.bounds.labels[m];
        moves[before].push_back(-m - 1);
        moves[label].push_back(m);
        count_move(before, part.weight(m), -1);
        count_move(label, part.weight(m), 1);
      }
    }
    const int64_t strips = (width_ + kMoveColumns - 1) / kMoveColumns;
    std::vector<std::vector<float>> scratch(useful_threads(num_threads, num_centers_ * strips),
                                            std::vector<float>(kMoveColumns));
    parallel_for(num_threads, num_centers_ * strips, [&](int64_t task, int thread) {
      const int64_t k = task / strips, first = task % strips * kMoveColumns;
      kernels_.move({part.tokens, moves[k].data(), static_cast<int64_t>(moves[k].size()), first,
                     std::min(width_, first + kMoveColumns), part.weights, scratch[thread].data(),
                     sums_.data() + k * width_});
    });
    return changed;
  }

  void count_move(int32_t center, double weight, int sign) {
    counts_[center] += sign * weight;
    members_[center] += weight > 0. ? sign : 0;
  }

  // A centre that lost its last token keeps nothing of the rounding.
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
    double total = total_;
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

  int64_t num_rows_ = 0;  // M, of all parts
  std::vector<Part> parts_;
  std::vector<int64_t> chunk_begins_;  // first token of each chunk of each part, and M

  std::vector<int32_t> labels_;
  std::unique_ptr<float[]> norms_, upper_, lower_;
  std::unique_ptr<uint16_t[]> rows_;   // per chunk: tokens that failed, then those that changed
  std::unique_ptr<int32_t[]> before_;  // of one part, per chunk: centres that the latter had
  std::vector<int64_t> per_chunk_;     // how many
  std::vector<float> positions_;       // [K, D] centres of the last pass, shifted
  std::vector<double> sums_, counts_;  // [K, D] shifted, [K]
  std::vector<double> part_sums_, part_counts_;  // of one part
  std::vector<int64_t> members_;                 // [K] tokens with a weight above zero
  double total_ = 0.;                            // weighted sum of the norms
  std::vector<std::vector<float>> scratch_;      // per thread

  int64_t last_changed_ = 0;  // labels that the last pass changed
  bool bounded_ = false;      // the bounds hold for the centres of the last pass

  PassReport pass_;  // the pass under way, or the last one
  std::unique_ptr<PackedGroups> packed_;
  std::vector<int64_t> wanted_;  // parts that it has to read
  size_t next_ = 0;              // of these, how many it has read
  bool ended_ = true;
};

PrunedPasses::PrunedPasses(const std::vector<int64_t>& part_rows, int64_t width, const float* shift,
                           int64_t num_centers, const std::string& isa)
    : state_(new State(part_rows, width, shift, num_centers, isa)) {}

PrunedPasses::~PrunedPasses() = default;

const std::vector<int64_t>& PrunedPasses::begin(const float* centers, int num_threads) {
  return state_->begin(centers, num_threads);
}

void PrunedPasses::add(int64_t part, const TokenView& tokens, const float* weights,
                       int num_threads) {
  state_->add(part, tokens, weights, num_threads);
}

PassReport PrunedPasses::end(double* sums, double* counts) { return state_->end(sums, counts); }

const std::vector<int32_t>& PrunedPasses::labels() const { return state_->labels(); }

}  // namespace spt_fast
