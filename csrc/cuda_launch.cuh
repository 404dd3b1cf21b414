// Launches of kernels on the current device: errors as exceptions, and the limits of shared memory.
#pragma once

#include <cuda_intrinsics.cuh>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace spt_fast {

inline void check_cuda(cudaError_t status, const char* what, const char* file, int line) {
  if (status == cudaSuccess) return;
  // Forget the error, which the next call would otherwise take for its own.
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status) + " (" +
                           file + ":" + std::to_string(line) + ")");
}
#define SPT_CUDA_CHECK(call) ::spt_fast::check_cuda((call), #call, __FILE__, __LINE__)

// Bytes of dynamic shared memory that a block of `kernel` may have: what the device allows, less
// the kernel's static part. More than 48 KiB of both has to be asked for. That is done here, once
// for a kernel and device and for the largest size, so that no thread lowers what another has asked
// for.
template <typename... Params>
int dynamic_shared_memory(void (*kernel)(Params...)) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  const auto* function = reinterpret_cast<const void*>(kernel);
  int device = 0;
  SPT_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = allowed.find({function, device});
  if (found != allowed.end()) return found->second;
  cudaFuncAttributes attributes{};
  SPT_CUDA_CHECK(cudaFuncGetAttributes(&attributes, function));
  int most = 0;
  SPT_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  most -= static_cast<int>(attributes.sharedSizeBytes);
  SPT_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  allowed[{function, device}] = most;
  return most;
}

// Enqueues kernel(args...) on `stream`, a stream of the current device.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
            cudaStream_t stream, Args... args) {
  if (shared_bytes > 0) dynamic_shared_memory(kernel);
  SPT_CUDA_CHECK(enqueue(kernel, grid, threads, shared_bytes, stream, args...));
}

}  // namespace spt_fast
