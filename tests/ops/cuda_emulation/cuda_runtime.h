// Just enough of CUDA to run the kernels of csrc/ on the CPU, for tests on machines without a GPU.
//
// The threads of a block are fibers of one OS thread: each runs until it ends or waits. A warp runs
// until all of its threads wait for another warp, then the next warp does: so warps are as far
// apart as their barriers let them. Order of warps and threads is forwards or
// (emulation::backwards) in reverse. Asynchronous copies take place when they are awaited or
// (emulation::early_copies) when they are issued. A missing barrier therefore gives different
// results, and a test may have any one skipped (emulation::skipped_wait) to see that. Dynamic
// shared memory starts as NaN, static shared memory with what the block before left there. Blocks
// run one after the other. Of the runtime's calls the limits of shared memory are modelled, and a
// GPU for which there is no code. Not modelled: other orders than these; memory order within a
// warp, since a collective makes all of its lanes wait; time; the GPU's rounding of anything but
// sums of products (see cuda_intrinsics.cuh).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline uint3 threadIdx, blockIdx;
inline dim3 gridDim;

namespace emulation {

inline constexpr size_t kStackBytes = 64 << 10;
inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;  // of a block
inline constexpr size_t kMaxShared = 232448;
inline constexpr int kStaticShared = 1024;  // of any kernel that has dynamic memory too, or less
inline constexpr int kUnaskedShared = 48 << 10;  // static and dynamic, without being asked for

// What a test may set: the order of the threads and when copies take place; what a block may have
// of shared memory, which is also the number of the GPU; whether there is code for the GPU, and
// whether launches are only checked against its limits.
inline bool backwards = false;
inline bool early_copies = false;
inline int shared_limit = kMaxShared;
inline bool has_code = true;
inline bool checks_only = false;

// A line of the kernels where threads of a block wait for each other, or for copies.
struct Wait {
  const char* file;
  int line;
};
inline std::vector<Wait> waits;  // those that threads have come to
inline int skipped_wait = -1;    // which of them does nothing; -1: none

inline bool is_skipped(const char* file, int line) {
  size_t index = 0;
  while (index < waits.size() && (waits[index].line != line || waits[index].file != file)) ++index;
  if (index == waits.size()) waits.push_back({file, line});
  return static_cast<int>(index) == skipped_wait;
}

struct Barrier {
  int arrived = 0;
  int expected = 0;
  unsigned generation = 0;
};

// Copies of one thread that are under way, in groups.
struct Copy {
  void* target;
  const void* source;
  int bytes;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false;
  bool done = false;
  unsigned collectives = 0;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open_group;
};

// What a lane shows its warp in a collective operation; two slots, used in turn, so that a lane
// that is ahead does not overwrite what others still read.
struct alignas(16) Exchange {
  unsigned char bytes[64];
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline const std::function<void()>* body;
inline unsigned current;
inline Barrier block_barrier;
inline Barrier warp_barriers[kMaxThreads / kWarp];
inline Exchange exchanges[2][kMaxThreads];
alignas(16) inline unsigned char shared[kMaxShared];
inline bool progress;
inline std::string error;  // what a thread threw: it must not leave the fiber

inline void leave(Barrier& barrier) {
  --barrier.expected;
  if (barrier.expected && barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}

inline void enter() {
  try {
    (*body)();
  } catch (const std::exception& thrown) {
    error = thrown.what();
  }
  Fiber& fiber = fibers[current];
  fiber.done = true;
  progress = true;
  leave(block_barrier);
  leave(warp_barriers[current / kWarp]);
  _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  progress = true;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) {
    if (!_setjmp(fibers[current].resume)) _longjmp(scheduler, 1);
  }
  progress = true;
}

inline void resume(unsigned thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx = {thread, 0, 0};
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Runs the threads of a warp in turn until none gets on; returns whether any is left.
inline bool run_warp(unsigned warp, bool& any_progress) {
  bool running = true;
  for (bool moved = true; running && moved; any_progress = any_progress || moved) {
    running = progress = false;
    for (unsigned i = 0; i < kWarp; ++i) {
      const unsigned thread = warp * kWarp + (backwards ? kWarp - 1 - i : i);
      if (fibers[thread].done) continue;
      resume(thread);
      if (!error.empty()) throw std::runtime_error(std::exchange(error, {}));
      running = running || !fibers[thread].done;
    }
    moved = progress;
  }
  return running;
}

inline void run_block(uint3 block, unsigned threads, const std::function<void()>& thread_body) {
  body = &thread_body;
  blockIdx = block;
  std::memset(shared, 0xff, kMaxShared);
  fibers.resize(threads);
  block_barrier = {0, static_cast<int>(threads), 0};
  for (unsigned warp = 0; warp * kWarp < threads; ++warp) warp_barriers[warp] = {0, kWarp, 0};
  for (Fiber& fiber : fibers) {
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    fiber.started = fiber.done = false;
    fiber.collectives = 0;
    fiber.groups.clear();
    fiber.open_group.clear();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
  const unsigned warps = threads / kWarp;
  for (bool running = true; running;) {
    running = false;
    bool any_progress = false;
    for (unsigned i = 0; i < warps; ++i) {
      running = run_warp(backwards ? warps - 1 - i : i, any_progress) || running;
    }
    if (running && !any_progress) throw std::runtime_error("threads wait for ever");
  }
}

// Shows `mine` to the warp and returns what its lanes show, [0] being lane 0's.
template <typename V>
struct Shown {
  const Exchange* first;
  V operator[](int lane) const {
    V value;
    std::memcpy(&value, first[lane].bytes, sizeof(V));
    return value;
  }
};

template <typename V>
Shown<V> show(const V& mine) {
  static_assert(sizeof(V) <= sizeof(Exchange::bytes));
  Exchange* slots = exchanges[fibers[current].collectives++ % 2];
  std::memcpy(slots[current].bytes, &mine, sizeof(V));
  wait(warp_barriers[current / kWarp]);
  return {slots + current / kWarp * kWarp};
}

inline int lane() { return static_cast<int>(current % kWarp); }

}  // namespace emulation

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!emulation::is_skipped(file, line)) emulation::wait(emulation::block_barrier);
}
inline void __syncwarp() {
  emulation::wait(emulation::warp_barriers[emulation::current / emulation::kWarp]);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  return emulation::show(value)[emulation::lane() ^ lane_mask];
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::show(value)[lane];
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const auto shown = emulation::show(predicate);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= (shown[lane] ? 1u : 0u) << lane;
  return result;
}
template <typename T>
unsigned __match_any_sync(unsigned, T value) {
  const auto shown = emulation::show(value);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= (shown[lane] == value ? 1u : 0u) << lane;
  return result;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
using std::isinf;

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

struct __half {
  _Float16 value;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline uint16_t __half_as_ushort(__half x) {
  uint16_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorNoKernelImageForDevice };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

namespace emulation {

// Dynamic bytes that kernels may have on a GPU because they have asked for them.
inline std::map<std::pair<const void*, int>, int> allowed_shared;

// What a launch with so much dynamic shared memory returns.
inline cudaError_t check_launch(const void* kernel, int dynamic_bytes) {
  if (!has_code) return cudaErrorNoKernelImageForDevice;
  const auto allowed = allowed_shared.find({kernel, shared_limit});
  const int most =
      allowed == allowed_shared.end() ? kUnaskedShared - kStaticShared : allowed->second;
  return dynamic_bytes <= most ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace emulation

inline cudaError_t cudaGetDevice(int* device) {
  return *device = emulation::shared_limit, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice
             ? "no kernel image is available for execution on the device"
             : "invalid argument";
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulation::shared_limit, cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  if (!emulation::has_code) return cudaErrorNoKernelImageForDevice;
  return attributes->sharedSizeBytes = emulation::kStaticShared, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulation::shared_limit - emulation::kStaticShared) return cudaErrorInvalidValue;
  return emulation::allowed_shared[{kernel, emulation::shared_limit}] = bytes, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  return std::memset(data, value, bytes), cudaSuccess;
}
