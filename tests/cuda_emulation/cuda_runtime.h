// Just enough of CUDA to run csrc/kmeans_cuda.cu on the CPU, for tests on machines without a GPU.
//
// A block's threads are fibers of one OS thread. Each runs until it ends or meets a barrier, then
// the next one runs, so the result is exact and repeatable, but data races between barriers are not
// found. Blocks run one after the other. The test rewrites `kernel<<<grid, block, 0,
// stream>>>(...)` into emulate(grid, block, ...).
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint3 threadIdx, blockIdx;

namespace emulation {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

inline constexpr size_t kStackBytes = 64 << 10;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline const std::function<void()>* body;
inline unsigned current;
inline double exchange[1024];

inline void enter() {
  (*body)();
  fibers[current].done = true;
}

inline void barrier() { swapcontext(&fibers[current].context, &scheduler); }

inline void run_block(unsigned num_threads, const std::function<void()>& thread_body) {
  body = &thread_body;
  fibers.resize(num_threads);
  for (Fiber& fiber : fibers) {
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (current = 0; current < num_threads; ++current) {
      if (fibers[current].done) continue;
      threadIdx = {current, 0, 0};
      swapcontext(&scheduler, &fibers[current].context);
      running = running || !fibers[current].done;
    }
  }
}

}  // namespace emulation

template <typename Kernel>
void emulate(dim3 grid, dim3 block, const Kernel& kernel) {
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        emulation::run_block(block.x, kernel);
      }
    }
  }
}

inline void __syncthreads() { emulation::barrier(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  std::memcpy(&emulation::exchange[threadIdx.x], &value, sizeof(T));
  emulation::barrier();
  std::memcpy(&value, &emulation::exchange[threadIdx.x ^ lane_mask], sizeof(T));
  emulation::barrier();
  return value;
}

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half half) {
  const int exponent = (half.bits >> 10) & 31;
  const float mantissa = half.bits & 1023;
  const float magnitude =
      exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return half.bits & 0x8000 ? -magnitude : magnitude;
}

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  return std::memset(data, value, bytes), cudaSuccess;
}
