// Twin of csrc/cuda_intrinsics.cuh on the CPU: fragment layouts as the PTX manual gives them.
//
// Asynchronous copies take place at the latest or the earliest moment that is allowed: when they
// are awaited, or when they are issued. Products are summed exactly and cut off to float32, as
// tensor cores do at worst.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>

namespace spt_fast {

inline unsigned char* dynamic_shared() { return emulation::shared; }

inline void take_place(const emulation::Copy& copy) {
  std::memset(copy.target, 0, 16);
  std::memcpy(copy.target, copy.source, copy.bytes);
}

inline void copy_async_16(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    throw std::runtime_error("an asynchronous copy is not aligned");
  }
  const emulation::Copy copy{shared, global, bytes};
  if (emulation::early_copies) return take_place(copy);
  emulation::fibers[emulation::current].open_group.push_back(copy);
}

inline void commit_copies() {
  emulation::Fiber& fiber = emulation::fibers[emulation::current];
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

template <int kPending>
void wait_copies(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (emulation::is_skipped(file, line)) return;
  emulation::Fiber& fiber = emulation::fibers[emulation::current];
  auto& groups = fiber.groups;
  while (groups.size() > kPending) {
    for (const emulation::Copy& copy : groups.front()) take_place(copy);
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

template <typename T>
void multiply_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
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

inline uint32_t equal_halves(uint32_t a, uint32_t b) {
  const auto equal = [&](int shift) {
    return widen(static_cast<uint16_t>(a >> shift), __half{}) ==
           widen(static_cast<uint16_t>(b >> shift), __half{});
  };
  return (equal(0) ? 0xffffu : 0u) | (equal(16) ? 0xffff0000u : 0u);
}

template <typename Piece>
void keep_packed(Piece&) {}

template <typename... Params, typename... Args>
cudaError_t enqueue(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
                    cudaStream_t, Args... args) {
  const cudaError_t status =
      emulation::check_launch(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (status != cudaSuccess || emulation::checks_only) return status;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        emulation::run_block({x, y, z}, threads, [&] { kernel(static_cast<Params>(args)...); });
      }
    }
  }
  return cudaSuccess;
}

}  // namespace spt_fast
