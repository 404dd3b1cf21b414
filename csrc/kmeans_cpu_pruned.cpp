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
#include <cmath>
#include <cstddef>

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

}  // namespace

class PrunedAssignCpu::Passes {
 public:
  Passes(const TokenView& tokens, const float* shift, const float* weights, int64_t num_centers,
         const std::string& isa)
      : kernels_(choose_kernels(isa)),
        view_(tokens),
        tokens_(tokens_of_group(view_, shift, 0)),
        weights_(weights),
        num_centers_(num_centers),
        width_(tokens.width),
        bound_groups_((num_centers + kernels_.bound_group - 1) / kernels_.bound_group),
        partition_(1, tokens.rows()),
        labels_(tokens.rows(), -1),
        norms_(new float[tokens.rows()]),
        upper_(new float[tokens.rows()]),
        lower_(new float[tokens.rows() * bound_groups_]),
        rows_(new uint16_t[tokens.rows()]),
        before_(new int32_t[tokens.rows()]),
        per_chunk_(partition_.chunks),
        positions_(num_centers * width_),
        sums_(num_centers * width_),
        counts_(num_centers),
        members_(num_centers),
        last_changed_(tokens.rows()) {
    bounds_.labels = labels_.data();
    bounds_.norms = norms_.get();
    bounds_.upper = upper_.get();
    bounds_.lower = lower_.get();
    bounds_.unit_error = 2.f * static_cast<float>(width_ + 16) / (1 << 24);
  }

  PrunedPass assign(const float* centers, double* sums, double* counts, int num_threads) {
    const std::vector<float> drifts = place_centers(centers);
    PrunedPass pass;
    pass.fresh = true;
    if (bounded_) {
      pass.evaluated = scan(drifts, num_threads);
      pass.fresh = pass.evaluated + kReadsOfChanged * last_changed_ > partition_.rows;
    }
    if (pass.fresh) {
      pass.evaluated = partition_.rows;
      pass.changed = start_afresh(centers, num_threads);
    } else {
      pass.changed = correct(centers, num_threads);
    }
    last_changed_ = pass.changed;
    write_sums(sums, counts);
    pass.inertia = inertia();
    return pass;
  }

  const std::vector<int32_t>& labels() const { return labels_; }

 private:
  // Takes the new centres in; returns how far each has moved at most.
  std::vector<float> place_centers(const float* centers) {
    std::vector<float> drifts(num_centers_);
    double largest_norm = 0.;
    for (int64_t k = 0; k < num_centers_; ++k) {
      double moved = 0., norm = 0.;
      for (int64_t d = 0; d < width_; ++d) {
        float& position = positions_[k * width_ + d];
        const float next = centers[k * width_ + d] - (tokens_.shift ? tokens_.shift[d] : 0.f);
        const double step = static_cast<double>(next) - position;
        moved += step * step;
        norm += static_cast<double>(next) * next;
        position = next;
      }
      drifts[k] = static_cast<float>(std::sqrt(moved)) * (1.f + kDriftSlack);
      largest_norm = std::max(largest_norm, norm);
    }
    bounds_.largest_norm = static_cast<float>(largest_norm) * (1.f + kDriftSlack);
    return drifts;
  }

  // Loosens the bounds and lists the tokens of each chunk that fail them; returns how many do.
  int64_t scan(const std::vector<float>& drifts, int num_threads) {
    std::vector<GroupDrift> groups(bound_groups_);
    for (int64_t k = 0; k < num_centers_; ++k) {
      groups[k / kernels_.bound_group].add(static_cast<int32_t>(k), drifts[k]);
    }
    parallel_for(num_threads, partition_.chunks,
                 [&](int64_t chunk, int) { scan_chunk(chunk, drifts, groups); });
    int64_t failed = 0;
    for (int64_t count : per_chunk_) failed += count;
    return failed;
  }

  void scan_chunk(int64_t chunk, const std::vector<float>& drifts,
                  const std::vector<GroupDrift>& groups) {
    const int64_t begin = partition_.begin(chunk), end = partition_.end(chunk);
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
      const float error = bounds_.unit_error * (norms_[m] + bounds_.largest_norm);
      rows_[begin + failed] = static_cast<uint16_t>(m - begin);
      failed += !certainly_farther(nearest_other, upper, error);
    }
    per_chunk_[chunk] = failed;
  }

  // Reads everything: new labels, bounds and sums. Returns how many labels changed.
  int64_t start_afresh(const float* centers, int num_threads) {
    AssignArgs args;
    double inertia;
    args.tokens = view_;
    args.centers = centers;
    args.shift = tokens_.shift;
    args.weights = weights_;
    args.num_centers = num_centers_;
    args.sums = sums_.data();
    args.counts = counts_.data();
    args.inertia = &inertia;
    BoundedPass pass;
    pass.bounds = bounds_;
    bounded_ = last_changed_ <= kWorthBounding * partition_.rows;
    if (!bounded_) pass.bounds.upper = nullptr;
    assign_pass(args, kernels_, num_threads, &pass);
    total_ = pass.total;
    std::fill(members_.begin(), members_.end(), 0);
    for (int64_t m = 0; m < partition_.rows; ++m) members_[labels_[m]] += has_weight(m);
    return pass.changed;
  }

  // Reads the tokens that failed, and corrects the sums. Returns how many labels changed.
  int64_t correct(const float* centers, int num_threads) {
    const PackedGroups packed(kernels_, centers, tokens_.shift, 1, num_centers_, width_,
                              Layout::kGrouped);
    std::vector<std::vector<float>> scratch(useful_threads(num_threads, partition_.chunks),
                                            std::vector<float>(kernels_.refine_floats(width_)));
    parallel_for(num_threads, partition_.chunks, [&](int64_t chunk, int thread) {
      const int64_t begin = partition_.begin(chunk);
      uint16_t* rows = rows_.get() + begin;
      per_chunk_[chunk] =
          kernels_.refine({tokens_, packed.group(0), begin, rows, per_chunk_[chunk], bounds_,
                           scratch[thread].data(), rows, before_.get() + begin});
    });
    return correct_sums(num_threads);
  }

  // Moves by centre, in the order of the tokens whatever the number of threads.
  int64_t correct_sums(int num_threads) {
    std::vector<std::vector<int64_t>> moves(num_centers_);
    int64_t changed = 0;
    for (int64_t chunk = 0; chunk < partition_.chunks; ++chunk) {
      const int64_t begin = partition_.begin(chunk);
      changed += per_chunk_[chunk];
      for (int64_t i = begin; i < begin + per_chunk_[chunk]; ++i) {
        const int64_t m = begin + rows_[i];
        moves[before_[i]].push_back(-m - 1);
        moves[labels_[m]].push_back(m);
        count_move(m, before_[i], -1);
        count_move(m, labels_[m], 1);
      }
    }
    const int64_t parts = (width_ + kMoveColumns - 1) / kMoveColumns;
    std::vector<std::vector<float>> scratch(useful_threads(num_threads, num_centers_ * parts),
                                            std::vector<float>(kMoveColumns));
    parallel_for(num_threads, num_centers_ * parts, [&](int64_t task, int thread) {
      const int64_t k = task / parts, first = task % parts * kMoveColumns;
      kernels_.move({tokens_, moves[k].data(), static_cast<int64_t>(moves[k].size()), first,
                     std::min(width_, first + kMoveColumns), weights_, scratch[thread].data(),
                     sums_.data() + k * width_});
    });
    return changed;
  }

  bool has_weight(int64_t m) const { return weights_ == nullptr || weights_[m] > 0.f; }

  void count_move(int64_t m, int32_t center, int sign) {
    counts_[center] += sign * static_cast<double>(weights_ ? weights_[m] : 1.f);
    members_[center] += has_weight(m) ? sign : 0;
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
        sums[k * width_ + d] = sum[d] + (tokens_.shift ? counts_[k] * tokens_.shift[d] : 0.);
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
  const TokenView view_;
  const GroupTokens tokens_;
  const float* weights_;
  const int64_t num_centers_, width_, bound_groups_;
  const Partition partition_;

  std::vector<int32_t> labels_;
  std::unique_ptr<float[]> norms_, upper_, lower_;
  TokenBounds bounds_;
  std::unique_ptr<uint16_t[]> rows_;   // per chunk: tokens that failed, then those that changed
  std::unique_ptr<int32_t[]> before_;  // per chunk: centres that the latter had
  std::vector<int64_t> per_chunk_;     // how many
  std::vector<float> positions_;       // [K, D] centres of the last pass, shifted
  std::vector<double> sums_, counts_;  // [K, D] shifted, [K]
  std::vector<int64_t> members_;       // [K] tokens with a weight above zero
  double total_ = 0.;                  // weighted sum of the norms
  int64_t last_changed_;               // labels that the last pass changed
  bool bounded_ = false;               // the bounds hold for the centres of the last pass
};

PrunedAssignCpu::PrunedAssignCpu(const TokenView& tokens, const float* shift, const float* weights,
                                 int64_t num_centers, const std::string& isa)
    : passes_(new Passes(tokens, shift, weights, num_centers, isa)) {}

PrunedAssignCpu::~PrunedAssignCpu() = default;

PrunedPass PrunedAssignCpu::assign(const float* centers, double* sums, double* counts,
                                   int num_threads) {
  return passes_->assign(centers, sums, counts, num_threads);
}

const std::vector<int32_t>& PrunedAssignCpu::labels() const { return passes_->labels(); }

}  // namespace spt_fast
