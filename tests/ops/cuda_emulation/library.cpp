// The emulated library: csrc/kmeans_cuda.cu on the CPU, with entry points for ctypes, which fills
// the argument structs of kmeans.h itself. A call returns an error message, or null.
#include <string>

#define SPT_CUDA_ARCHS "the emulation"
#include "kmeans_cuda.cu"

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

void emulated_machine(int shared_memory, int backwards, int early_copies) {
  emulation::shared_limit = shared_memory;
  emulation::early_copies = early_copies;
  emulation::backwards = backwards;
}

void emulated_checks_only(int checks_only) { emulation::checks_only = checks_only; }
void emulated_code(int has_code) { emulation::has_code = has_code; }

const char* emulated_why_not() {
  static std::string reason;
  reason = spt_fast::cuda_why_not();
  return reason.c_str();
}

// Forgets the waits that threads have come to, and has number `skipped` of the next ones skipped.
void emulated_skip_wait(int skipped) {
  emulation::waits.clear();
  emulation::skipped_wait = skipped;
}

// The file and line of a wait, or null behind the last one.
const char* emulated_wait(int index) {
  static std::string name;
  if (index >= static_cast<int>(emulation::waits.size())) return nullptr;
  const emulation::Wait& wait = emulation::waits[index];
  name = std::string(wait.file) + ":" + std::to_string(wait.line);
  return name.c_str();
}

int64_t emulated_assign_accumulate_workspace(const spt_fast::AssignArgs* args) {
  return spt_fast::assign_accumulate_cuda_workspace(*args);
}

int64_t emulated_distances_workspace(const spt_fast::DistanceArgs* args) {
  return spt_fast::distances_cuda_workspace(*args);
}

const char* emulated_assign_accumulate(const spt_fast::AssignArgs* args, void* workspace) {
  return message_of([&] { spt_fast::assign_accumulate_cuda(*args, workspace, nullptr); });
}

const char* emulated_distances(const spt_fast::DistanceArgs* args, void* workspace) {
  return message_of([&] { spt_fast::distances_cuda(*args, workspace, nullptr); });
}

}  // extern "C"
