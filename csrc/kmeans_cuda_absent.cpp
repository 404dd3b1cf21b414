// Stands in for kmeans_cuda.cu in a build without CUDA, so that the module offers the same
// functions in every build: each says what is missing.
#include <stdexcept>

#include "kmeans.h"

namespace spt_fast {
namespace {

constexpr const char* kReason = "spt_fast was built without CUDA";

[[noreturn]] void refuse() { throw std::runtime_error(kReason); }

}  // namespace

std::string cuda_why_not() { return kReason; }
int64_t assign_accumulate_cuda_workspace(const AssignArgs&) { refuse(); }
void assign_accumulate_cuda(const AssignArgs&, void*, void*) { refuse(); }
int64_t distances_cuda_workspace(const DistanceArgs&) { refuse(); }
void distances_cuda(const DistanceArgs&, void*, void*) { refuse(); }

}  // namespace spt_fast
