// Twin of csrc/cuda_intrinsics.cuh on the CPU: fragment layouts as the PTX manual gives them.
//
// Asynchronous copies and products of warpgroups take place only when they are awaited, the latest
// moment that is allowed. Products are summed exactly and cut off to float32, as tensor cores do at
// worst.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <stdexcept>

namespace spt_fast {

#define SPT_HAS_WARPGROUPS 1

inline unsigned char* dynamic_shared() { return emulation::shared[emulation::current_block()]; }

inline void copy_async(void* shared, const void* global, int bytes, int padded) {
  if (reinterpret_cast<uintptr_t>(shared) % padded ||
      reinterpret_cast<uintptr_t>(global) % padded) {
    throw std::runtime_error("an asynchronous copy is not aligned");
  }
  emulation::fibers[emulation::current].open_group.push_back({shared, global, bytes, padded});
}
inline void copy_async_16(void* shared, const void* global, int bytes) {
  copy_async(shared, global, bytes, 16);
}
inline void copy_async_4(void* shared, const void* global, int bytes) {
  copy_async(shared, global, bytes, 4);
}

inline void commit_copies() {
  emulation::Fiber& fiber = emulation::fibers[emulation::current];
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

template <int kPending>
void wait_copies() {
  emulation::Fiber& fiber = emulation::fibers[emulation::current];
  auto& groups = fiber.groups;
  while (groups.size() > kPending) {
    fiber.unshown = fiber.unshown || !groups.front().empty();
    for (const emulation::Copy& copy : groups.front()) {
      std::memset(copy.target, 0, copy.padded);
      std::memcpy(copy.target, copy.source, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

inline uint16_t half_at(const void* row, int index) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(row) + 2 * index, 2);
  return bits;
}

inline emulation::Shown<const void*> show_rows(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    throw std::runtime_error("a matrix row is not aligned");
  return emulation::show(row);
}

inline void load_matrices(uint32_t (&out)[4], const void* row) {
  const auto rows = show_rows(row);
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const void* source = rows[8 * i + lane / 4];
    out[i] = half_at(source, 2 * (lane % 4)) | half_at(source, 2 * (lane % 4) + 1) << 16;
  }
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  const auto rows = show_rows(row);
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    out[i] = half_at(rows[8 * i + 2 * (lane % 4)], lane / 4) |
             half_at(rows[8 * i + 2 * (lane % 4) + 1], lane / 4) << 16;
  }
}

struct Operands {
  uint32_t a[4];
  uint32_t b[2];
};

inline float cut_off(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(nearest) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

inline float widen(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline float widen(uint16_t bits, __half) {
  __half half;
  std::memcpy(&half, &bits, 2);
  return __half2float(half);
}

inline uint16_t narrow(float x, __nv_bfloat16) { return __float2bfloat16_rn(x).bits; }
inline uint16_t narrow(float x, __half) { return __half_as_ushort(__float2half_rn(x)); }

template <typename T>
void multiply_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto shown = emulation::show(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const int n = 2 * (lane % 4) + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int shift = k % 2 * 16;
      // Row lane / 4 + 8 (i / 2) of a: the lane of row lane / 4, the register of its half.
      const uint32_t x = shown[lane / 4 * 4 + k % 8 / 2].a[i / 2 + k / 8 * 2];
      const uint32_t y = shown[n * 4 + k % 8 / 2].b[k / 8];
      sum += static_cast<double>(widen(static_cast<uint16_t>(x >> shift), T{})) *
             widen(static_cast<uint16_t>(y >> shift), T{});
    }
    c[i] = cut_off(sum);
  }
}

inline void multiply_tf32(float (&c)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  constexpr uint32_t kUsed = 0xffffe000u;
  const auto shown = emulation::show(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const int n = 2 * (lane % 4) + i % 2;
    double sum = c[i];
    for (int k = 0; k < 8; ++k) {
      const uint32_t x = shown[lane / 4 * 4 + k % 4].a[i / 2 + k / 4 * 2] & kUsed;
      const uint32_t y = shown[n * 4 + k % 4].b[k / 4] & kUsed;
      sum += static_cast<double>(__uint_as_float(x)) * __uint_as_float(y);
    }
    c[i] = cut_off(sum);
  }
}

// To nearest, ties away from zero.
inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return std::isfinite(x) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

struct ClusterPointer {
  unsigned char* address;
};
inline ClusterPointer in_block(const void* pointer, int rank) {
  const auto offset = static_cast<const unsigned char*>(pointer) - dynamic_shared();
  return {emulation::shared[rank] + offset};
}
template <typename V>
void store_remote(ClusterPointer target, V value) {
  if (reinterpret_cast<uintptr_t>(target.address) % sizeof(V)) {
    throw std::runtime_error("a remote store is not aligned");
  }
  std::memcpy(target.address, &value, sizeof(V));
}

inline void cluster_arrive() {
  emulation::Fiber& fiber = emulation::fibers[emulation::current];
  fiber.cluster_generation = emulation::arrive(emulation::cluster_barrier);
}
inline void cluster_wait() {
  emulation::wait_after(emulation::cluster_barrier,
                        emulation::fibers[emulation::current].cluster_generation);
}

inline void show_to_warpgroups() { emulation::fibers[emulation::current].unshown = false; }

inline void begin_products() {}
inline void commit_products() {
  emulation::Fiber& fiber = emulation::fibers[emulation::current];
  fiber.product_groups.push_back(std::move(fiber.open_products));
  fiber.open_products.clear();
}
template <int kPending>
void wait_products() {
  auto& groups = emulation::fibers[emulation::current].product_groups;
  while (groups.size() > kPending) {
    for (const emulation::Product& product : groups.front()) product();
    groups.erase(groups.begin());
  }
}

// As the hardware reads it: the permutation is one of address bits, 4 to 6 by 7 to 9.
struct SwizzledMatrix {
  const unsigned char* start;
  int next_columns;
};
inline SwizzledMatrix swizzled_matrix(const void* start, int next_columns) {
  return {static_cast<const unsigned char*>(start), next_columns};
}
inline SwizzledMatrix advance(const SwizzledMatrix& matrix, int bytes) {
  return {matrix.start + bytes, matrix.next_columns};
}
inline uint16_t swizzled_value(const unsigned char* place) {
  const auto address = reinterpret_cast<uintptr_t>(place);
  return half_at(reinterpret_cast<const void*>(address ^ (address >> 7 & 7) << 4), 0);
}
inline const unsigned char* swizzled_row(const SwizzledMatrix& matrix, int row) {
  return matrix.start + row / 8 * 1024 + row % 8 * 128;
}

template <typename T, typename Combine>
uint32_t combine_pairs(uint32_t a, uint32_t b, T type, const Combine& combine) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float value = combine(widen(static_cast<uint16_t>(a >> shift), type),
                                widen(static_cast<uint16_t>(b >> shift), type));
    result |= static_cast<uint32_t>(narrow(value, type)) << shift;
  }
  return result;
}
template <typename T>
uint32_t equal_ones(uint32_t a, uint32_t b, T type) {
  return combine_pairs(a, b, type, [](float x, float y) { return x == y ? 1.0f : 0.0f; });
}
template <typename T>
uint32_t add_pairs(uint32_t a, uint32_t b, T type) {
  return combine_pairs(a, b, type, [](float x, float y) { return x + y; });
}

inline void start_product(emulation::Product product) {
  const unsigned first = emulation::current_block() * emulation::block_threads;
  for (unsigned i = 0; i < emulation::block_threads; ++i) {
    if (emulation::fibers[first + i].unshown) {
      throw std::runtime_error("a product is started before the copies are shown to it");
    }
  }
  emulation::fibers[emulation::current].open_products.push_back(std::move(product));
}

template <int kSums, typename T>
void multiply_shared(float (&sum)[kSums], SwizzledMatrix a, SwizzledMatrix b, bool add, T type) {
  float* sums = sum;
  const int lane = emulation::lane(), warp = threadIdx.x / 32 % 4;
  start_product([=] {
    for (int i = 0; i < kSums; ++i) {
      const int row = 16 * warp + lane / 4 + i % 4 / 2 * 8;
      const int column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      double total = add ? sums[i] : 0.0;
      for (int k = 0; k < 16; ++k) {
        const uint16_t x = swizzled_value(swizzled_row(a, row) + 2 * k);
        const uint16_t y = swizzled_value(swizzled_row(b, column) + 2 * k);
        total += static_cast<double>(widen(x, type)) * widen(y, type);
      }
      sums[i] = cut_off(total);
    }
  });
}

template <typename T>
void multiply_registers(float (&sum)[32], const uint32_t (&a)[4], SwizzledMatrix b, T type) {
  float* sums = sum;
  const auto shown = emulation::show(Operands{{a[0], a[1], a[2], a[3]}, {}});
  const int lane = emulation::lane();
  std::array<float, 32> rows;  // 16 values of row lane / 4, then of the row 8 further on
  for (int i = 0; i < 32; ++i) {
    const int k = i % 16;
    const uint32_t pair = shown[lane / 4 * 4 + k % 8 / 2].a[i / 16 + k / 8 * 2];
    rows[i] = widen(static_cast<uint16_t>(pair >> k % 2 * 16), type);
  }
  start_product([=] {
    for (int i = 0; i < 32; ++i) {
      const int column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      double total = sums[i];
      for (int k = 0; k < 16; ++k) {
        const unsigned char* place =
            swizzled_row(b, k) + column / 64 * b.next_columns + 2 * (column % 64);
        total += static_cast<double>(rows[i % 4 / 2 * 16 + k]) * widen(swizzled_value(place), type);
      }
      sums[i] = cut_off(total);
    }
  });
}

template <typename... Params, typename... Args>
cudaError_t launch_clusters(void (*kernel)(Params...), dim3 grid, int blocks, int threads,
                            int shared_bytes, cudaStream_t, Args... args) {
  if (shared_bytes > emulation::shared_limit) {
    throw std::runtime_error("more shared memory than the GPU has");
  }
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += blocks) {
        emulation::run_cluster({x, y, z}, blocks, threads,
                               [&] { kernel(static_cast<Params>(args)...); });
      }
    }
  }
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
                   cudaStream_t stream, Args... args) {
  return launch_clusters(kernel, grid, 1, threads, shared_bytes, stream, args...);
}

}  // namespace spt_fast
