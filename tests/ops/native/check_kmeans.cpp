// Runs the CPU kernels on awkward shapes and compares them with plain loops in double precision.
// Built by tests/test_sanitizers.py under AddressSanitizer, UBSan and ThreadSanitizer: buffers are
// sized to the byte.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kmeans.h"

using spt_fast::AssignArgs;
using spt_fast::DistanceArgs;
using spt_fast::TokenView;

namespace {

struct Shape {
  int64_t groups, outer, inner, skipped, width, centers;
};

int failures = 0;

void expect_close(double got, double expected, double scale, const char* what) {
  if (std::abs(got - expected) <= 1e-5 * scale + 1e-6) return;
  std::printf("%s: got %.9g, expected %.9g\n", what, got, expected);
  ++failures;
}

double squared_distance(const float* x, const float* c, int64_t width) {
  double total = 0;
  for (int64_t d = 0; d < width; ++d) total += (double(x[d]) - c[d]) * (double(x[d]) - c[d]);
  return total;
}

void check(const Shape& s, const std::string& isa, int threads) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const int64_t row_stride = s.width, outer_stride = (s.inner + s.skipped) * row_stride;
  std::vector<float> data(s.groups * s.outer * outer_stride),
      centers(s.groups * s.centers * s.width);
  std::vector<float> shift(s.groups * s.width), weights(s.groups * s.outer * s.inner);
  for (auto* values : {&data, &centers, &shift}) {
    for (float& value : *values) value = normal(random);
  }
  for (float& weight : weights) weight = std::abs(normal(random));

  // The skipped tokens come first, so the last token ends where the buffer does.
  TokenView view;
  view.data = data.data() + s.skipped * row_stride;
  view.groups = s.groups;
  view.outer = s.outer;
  view.inner = s.inner;
  view.width = s.width;
  view.group_stride = s.outer * outer_stride;
  view.outer_stride = outer_stride;
  view.inner_stride = row_stride;

  const int64_t rows = view.rows();
  std::vector<double> sums(s.groups * s.centers * s.width), counts(s.groups * s.centers);
  std::vector<double> inertia(s.groups);
  std::vector<int32_t> labels(s.groups * rows);
  std::vector<float> nearest(s.groups * rows), all(s.groups * rows * s.centers);
  AssignArgs assign{view,        centers.data(), shift.data(),   weights.data(), s.centers,
                    sums.data(), counts.data(),  inertia.data(), labels.data(),  nearest.data()};
  spt_fast::assign_accumulate_cpu(assign, threads, isa);
  DistanceArgs distances{view, centers.data(), shift.data(), s.centers, all.data()};
  spt_fast::distances_cpu(distances, threads, isa);

  std::vector<double> expected_sums(sums.size());
  for (int64_t g = 0; g < s.groups; ++g) {
    for (int64_t m = 0; m < rows; ++m) {
      const float* token = static_cast<const float*>(view.data) + g * view.group_stride +
                           (m / s.inner) * outer_stride + (m % s.inner) * row_stride;
      const int32_t label = labels[g * rows + m];
      double smallest = INFINITY;
      for (int64_t k = 0; k < s.centers; ++k) {
        const double exact =
            squared_distance(token, &centers[(g * s.centers + k) * s.width], s.width);
        smallest = std::min(smallest, exact);
        expect_close(all[(g * rows + m) * s.centers + k], exact, 4. * s.width, "distance");
      }
      expect_close(nearest[g * rows + m], smallest, 4. * s.width, "nearest distance");
      for (int64_t d = 0; d < s.width; ++d) {
        expected_sums[(g * s.centers + label) * s.width + d] +=
            double(weights[g * rows + m]) * token[d];
      }
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) expect_close(sums[i], expected_sums[i], rows, "sum");
}

// Lloyd's algorithm with pruned passes over images in chunks of `chunk_images`, each in a buffer of
// its own: labels are those of the plain pass, and so are the sums.
void check_pruned(const Shape& s, int64_t chunk_images, const std::string& isa, int threads) {
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  const int64_t rows = s.outer * s.inner;
  std::vector<float> data(rows * s.width), shift(s.width), weights(rows);
  for (size_t i = 0; i < data.size(); ++i) {
    data[i] = normal(random) + 3.f * static_cast<float>(i / s.width % 7);
  }
  for (float& weight : weights) weight = std::abs(normal(random));
  std::vector<float> centers(data.begin(), data.begin() + s.centers * s.width);

  TokenView view;
  view.data = data.data();
  view.groups = 1;
  view.outer = s.outer;
  view.inner = s.inner;
  view.width = s.width;
  view.outer_stride = s.inner * s.width;
  view.inner_stride = s.width;
  std::vector<int64_t> chunk_rows;
  for (int64_t first = 0; first < s.outer; first += chunk_images) {
    chunk_rows.push_back(std::min(chunk_images, s.outer - first) * s.inner);
  }
  spt_fast::PrunedPasses passes(chunk_rows, s.width, shift.data(), s.centers, isa);
  std::vector<double> sums(s.centers * s.width), counts(s.centers), inertia(1);
  std::vector<double> plain_sums(sums.size()), plain_counts(s.centers);
  std::vector<int32_t> labels(rows);
  for (int pass = 0; pass < 12; ++pass) {
    for (int64_t chunk : passes.begin(centers.data(), threads)) {
      const int64_t first = chunk * chunk_images * s.inner, end = first + chunk_rows[chunk];
      const std::vector<float> tokens(&data[first * s.width], data.data() + end * s.width);
      const std::vector<float> its_weights(&weights[first], weights.data() + end);
      TokenView its_view = view;
      its_view.data = tokens.data();
      its_view.outer = chunk_rows[chunk] / s.inner;
      passes.add(chunk, its_view, its_weights.data(), threads);
    }
    const auto done = passes.end(sums.data(), counts.data());
    AssignArgs plain{view,         centers.data(),    shift.data(),        weights.data(),
                     s.centers,    plain_sums.data(), plain_counts.data(), inertia.data(),
                     labels.data()};
    spt_fast::assign_accumulate_cpu(plain, threads, isa);
    if (passes.labels() != labels) {
      std::printf("pruned labels differ in pass %d\n", pass);
      ++failures;
    }
    expect_close(done.inertia, inertia[0], inertia[0], "pruned inertia");
    for (size_t i = 0; i < sums.size(); ++i) {
      expect_close(sums[i], plain_sums[i], 1e-3 * rows, "pruned sum");
    }
    for (size_t i = 0; i < sums.size(); ++i) {
      const double count = counts[i / s.width];
      if (count > 0.) centers[i] = static_cast<float>(sums[i] / count);
    }
  }
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 1, 1, 0, 1, 1},     {2, 3, 7, 1, 5, 3},     {3, 5, 63, 1, 33, 20},
                          {1, 4, 300, 2, 17, 49}, {2, 1, 1025, 1, 8, 16}, {1, 2, 9, 0, 131, 100}};
  for (const std::string& isa : spt_fast::cpu_isas()) {
    for (const Shape& shape : shapes) {
      for (int threads : {1, 3}) check(shape, isa, threads);
    }
    for (const Shape& shape : {Shape{1, 3, 1000, 0, 21, 37}, Shape{1, 1, 1, 0, 3, 1}}) {
      for (int64_t chunk_images : {1, 2, 3}) {
        for (int threads : {1, 3}) check_pruned(shape, chunk_images, isa, threads);
      }
    }
    std::printf("%s checked\n", isa.c_str());
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
