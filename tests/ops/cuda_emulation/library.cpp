// The emulated library: csrc/kmeans_cuda.cu on the CPU, with entry points for ctypes, which fills
// the argument structs of kmeans.h itself. A call returns an error message, or null.
#include <string>

#include "../../csrc/kmeans_cuda.cu"

namespace {

template <typename Call>
const char* message_of(const Call& call) {
  static std::string message;
  try {
    call();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {

void emulated_machine(int shared_memory, int backwards) {
  emulation::shared_limit = shared_memory;
  emulation::backwards = backwards;
}

int64_t emulated_assign_accumulate_workspace(const spt_fast::AssignArgs* args) {
  return spt_fast::assign_accumulate_cuda_workspace(*args);
}

int64_t emulated_distances_workspace(const spt_fast::DistanceArgs* args) {
  return spt_fast::distances_cuda_workspace(*args);
}

const char* emulated_assign_accumulate(const spt_fast::AssignArgs* args, void* workspace) {
  return message_of([&] { spt_fast::assign_accumulate_cuda(*args, workspace, 0, nullptr); });
}

const char* emulated_distances(const spt_fast::DistanceArgs* args, void* workspace) {
  return message_of([&] { spt_fast::distances_cuda(*args, workspace, 0, nullptr); });
}

}  // extern "C"
