// The contract between the bindings and the k-means kernels: plain structs of pointers and sizes.
//
// Nothing here knows Python or torch. M = outer * inner tokens per group, D = width, K =
// num_centers, G = groups. All output arrays are dense and row-major.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace spt_fast {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Internal linkage: objects built for different instruction sets must not share its code.
static constexpr int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Tokens of G groups. Token m = i * inner + j of group g starts at element
// g * group_stride + i * outer_stride + j * inner_stride; its D elements are adjacent. The two
// inner levels let a [B, N, D] activation be read in place with its prefix tokens skipped.
struct TokenView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t groups = 0;
  int64_t outer = 0;
  int64_t inner = 0;
  int64_t width = 0;
  int64_t group_stride = 0;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;

  int64_t rows() const { return outer * inner; }
};

// Assign every token to its nearest centre (the lowest index wins a tie) and accumulate per centre.
// `shift` is a point near the data, usually its mean: it is subtracted from tokens and centres
// before |x|^2 - 2 x.c + |c|^2, which would otherwise cancel in float32. It does not change the
// meaning of any output: sums are sums of the tokens as given.
struct AssignArgs {
  TokenView tokens;                // IN
  const float* centers = nullptr;  // IN  [G, K, D]
  const float* shift = nullptr;    // IN  [G, D], or null: zero
  const float* weights = nullptr;  // IN  [G, M], or null: one
  int64_t num_centers = 0;         //     K >= 1
  double* sums = nullptr;          // OUT [G, K, D] weighted sum of the tokens of each centre
  double* counts = nullptr;        // OUT [G, K]    sum of their weights
  double* inertia = nullptr;       // OUT [G]       weighted sum of squared distances
  int32_t* labels = nullptr;       // OUT [G, M], or null
  float* distances = nullptr;      // OUT [G, M] squared distance to the nearest centre, or null
  // Whether sums, counts and labels are INOUT, those of a pass over the same tokens, without
  // weights, to other centres. Sums and counts may then be corrected by the tokens that change to
  // another centre. The CPU makes them anew.
  bool corrects = false;
};

// All squared distances, for seeding and for `transform`.
struct DistanceArgs {
  TokenView tokens;                // IN
  const float* centers = nullptr;  // IN  [G, K, D]
  const float* shift = nullptr;    // IN  [G, D], or null: zero
  int64_t num_centers = 0;         //     K >= 1
  float* distances = nullptr;      // OUT [G, M, K]
};

// CPU. Results do not depend on `num_threads`. `isa` is one of cpu_isas(), or empty: the best one.
// Throws std::invalid_argument on an unknown or unsupported isa.
void assign_accumulate_cpu(const AssignArgs& args, int num_threads, const std::string& isa);
void distances_cpu(const DistanceArgs& args, int num_threads, const std::string& isa);

// What one pass of PrunedPasses did.
struct PassReport {
  double inertia = 0.;         // weighted sum of squared distances to the centres of this pass
  int64_t tokens_read = 0;     // tokens that were read to find their centre
  int64_t tokens_changed = 0;  // tokens that changed to another centre; all in the first pass
  bool read_all = false;       // every token was read, and the sums were made anew
};

// Assign-and-accumulate over the same tokens again and again while the centres move little: tokens
// whose centre cannot have changed are not read. The tokens of one group come in chunks, which need
// not be in memory together. Labels are bit for bit those of assign_accumulate_cpu; sums and counts
// are in float64 throughout. Results do not depend on the number of threads, but the last bits of
// the sums do on how the tokens are cut. See kmeans_cpu_pruned.cpp.
class PrunedPasses {
 public:
  // Chunks of `chunk_rows` >= 1 tokens. `shift` [D], or null, is copied. Throws
  // std::invalid_argument on a bad isa.
  PrunedPasses(const std::vector<int64_t>& chunk_rows, int64_t width, const float* shift,
               int64_t num_centers, const std::string& isa);
  ~PrunedPasses();

  // Starts a pass: IN centers [K, D]. Returns the chunks that have to be read, ascending.
  const std::vector<int64_t>& begin(const float* centers, int num_threads);

  // The next of these chunks: one group of tokens and their weights (or null), the same in every
  // pass. Throws std::invalid_argument if it is another chunk, or of another size.
  void add(int64_t chunk, const TokenView& tokens, const float* weights, int num_threads);

  // Ends a pass: OUT sums [K, D], counts [K]. Throws std::invalid_argument if a chunk is missing.
  PassReport end(double* sums, double* counts);

  const std::vector<int32_t>& labels() const;  // [M], of the last pass

 private:
  class State;
  std::unique_ptr<State> state_;
};

// Instruction sets this build holds and this processor runs, best first.
std::vector<std::string> cpu_isas();

// CUDA. Every pointer is memory of the current device, and `stream` one of its streams. Enqueues,
// allocates nothing, does not synchronise. `workspace` holds ..._cuda_workspace() bytes, which
// looks at the sizes in `args` only. `shift` must be given. Throws std::invalid_argument on empty
// tokens or a missing array, std::runtime_error with file and line on a CUDA error, and in a build
// without CUDA (kmeans_cuda_absent.cpp). cuda_why_not() is empty if the current device can run the
// kernels, else the reason why not.
std::string cuda_why_not();
int64_t assign_accumulate_cuda_workspace(const AssignArgs& args);
void assign_accumulate_cuda(const AssignArgs& args, void* workspace, void* stream);
int64_t distances_cuda_workspace(const DistanceArgs& args);
void distances_cuda(const DistanceArgs& args, void* workspace, void* stream);

}  // namespace spt_fast
