// Products of tokens and centres on tensor cores, from tiles in shared memory, at float32's
// accuracy.
//
// bfloat16 and float16: x . c^ = x . high + x . low, with x as it is and the centre split in two
// values of the same type, 16 (22) bits in all: two products.
// float32: (x - shift) . c' with both factors split in two tf32 values, high + low; the product
// low . low is left out: three products.
//
// Lane maps (PTX ISA, "Matrix Fragments for mma.m16n8k16" and m16n8k8). Four neighbouring lanes, a
// quad, hold a row of the result; registers i of a lane hold
//   result c[i]       row quad_row() + 8 (i / 2)   column pair_column() + i % 2
//   half types a[i]   row quad_row() + 8 (i % 2)   columns pair_column() + 8 (i / 2), and the next
//   half types b[i]   rows pair_column() + 8 i, and the next   column quad_row()
//   tf32 a[i]         row quad_row() + 8 (i % 2)   column quad_lane() + 4 (i / 2)
//   tf32 b[i]         row quad_lane() + 4 i        column quad_row()
#pragma once

#include "kmeans_cuda_problem.cuh"

namespace spt_fast {

constexpr int kQuad = 4;

__device__ inline int quad_lane() { return threadIdx.x % kQuad; }
__device__ inline int quad_row() { return threadIdx.x % kWarp / kQuad; }
__device__ inline int pair_column() { return 2 * quad_lane(); }

// The sum of `x` over the lanes of a quad, in each of them.
__device__ inline float sum_over_quad(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// The two values of a register, the one of the lower column first.
__device__ inline float2 unpack(uint32_t pair, __nv_bfloat16) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ inline float2 unpack(uint32_t pair, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// The address that a lane gives to load_matrices() for 16 rows of 32 bytes: lanes 0 to 15 those of
// the rows, lanes 16 to 31 those of the rows 16 bytes further on.
__device__ inline const unsigned char* matrix_row(const unsigned char* tile, int stride) {
  const int lane = threadIdx.x % kWarp;
  return tile + lane % 16 * stride + lane / 16 * 16;
}

// The nearest tf32 value, as float32, ties away from zero. That of a NaN may be finite, but not
// what is left of it: x - round_to_tf32(x). The instruction cvt.rna compiles to twice as many.
__device__ inline uint32_t round_to_tf32(float x) {
  return (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
}

__device__ inline void add_square(float& sum, float x, float shift) {
  const float difference = x - shift;
  sum = fmaf(difference, difference, sum);
}

// 16 rows x 16 columns of tokens, the a of a product. add_norm: norm[i] += what this lane holds of
// |x - shift|^2 of row quad_row() + 8 i; sum_over_quad() makes it whole. IN tile: 16 rows, `stride`
// bytes apart; shift [16].
template <typename T>
struct Rows {
  uint32_t values[4];

  __device__ void load(const unsigned char* tile, int stride, const float*) {
    load_matrices(values, matrix_row(tile, stride));
  }
  __device__ void add_norm(const float* shift, float (&norm)[2]) const {
    const float2 near = *reinterpret_cast<const float2*>(shift + pair_column());
    const float2 far = *reinterpret_cast<const float2*>(shift + 8 + pair_column());
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack(values[i], T{});
      add_square(norm[i % 2], x.x, i < 2 ? near.x : far.x);
      add_square(norm[i % 2], x.y, i < 2 ? near.y : far.y);
    }
  }
};

template <>
struct Rows<float> {
  uint32_t high[8];
  uint32_t low[8];
  float squares[2];

  __device__ void load(const unsigned char* tile, int stride, const float* shift) {
    uint32_t raw[8];
    squares[0] = squares[1] = 0.0f;
    load_matrices(*reinterpret_cast<uint32_t (*)[4]>(raw), matrix_row(tile, stride));
    load_matrices(*reinterpret_cast<uint32_t (*)[4]>(raw + 4), matrix_row(tile + 32, stride));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = __uint_as_float(raw[i]) - shift[i / 2 * 4 + quad_lane()];
      squares[i % 2] = fmaf(x, x, squares[i % 2]);
      high[i] = round_to_tf32(x);
      low[i] = __float_as_uint(x - __uint_as_float(high[i]));
    }
  }
  __device__ void add_norm(const float*, float (&norm)[2]) const {
    norm[0] += squares[0];
    norm[1] += squares[1];
  }
};

// 16 columns x 8 centres, the b of a product: a lane's 16 bytes of Problem::packed.
template <typename T>
struct Centers {
  uint4 halves;

  __device__ explicit Centers(uint4 packed) : halves(packed) {}

  __device__ void multiply_add(float (&sum)[4], const Rows<T>& rows) const {
    multiply_half(sum, rows.values, halves.x, halves.y, T{});
    multiply_half(sum, rows.values, halves.z, halves.w, T{});
  }
};

template <>
struct Centers<float> {
  uint32_t high[4];
  uint32_t low[4];

  __device__ explicit Centers(uint4 packed) {
    const uint32_t raw[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = round_to_tf32(__uint_as_float(raw[i]));
      low[i] = __float_as_uint(__uint_as_float(raw[i]) - __uint_as_float(high[i]));
    }
  }

  __device__ void multiply_add(float (&sum)[4], const Rows<float>& rows) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t* a_high = rows.high + 4 * step;
      multiply_tf32(sum, rows.low + 4 * step, high[2 * step], high[2 * step + 1]);
      multiply_tf32(sum, a_high, low[2 * step], low[2 * step + 1]);
      multiply_tf32(sum, a_high, high[2 * step], high[2 * step + 1]);
    }
  }
};

// The a of a sum: 16 centres x 16 tokens, one where the token belongs to the centre, else zero. IN
// labels [16], below 1024, or -1 for none. As float16 values they are equal where they are as
// integers, and -1 is a NaN.
template <typename T>
struct Membership {
  uint32_t values[4];

  __device__ void set(const int16_t* labels, int first_center) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t center = first_center + quad_row() + i % 2 * 8;
      const auto pair = *reinterpret_cast<const uint32_t*>(labels + pair_column() + i / 2 * 8);
      values[i] = equal_halves(pair, center | center << 16) & one_bits(T{}) * 0x10001u;
    }
  }
  __device__ static uint32_t one_bits(__nv_bfloat16) { return 0x3f80u; }
  __device__ static uint32_t one_bits(__half) { return 0x3c00u; }
};

template <>
struct Membership<float> {
  uint32_t values[8];

  __device__ void set(const int16_t* labels, int first_center) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int center = first_center + quad_row() + i % 2 * 8;
      values[i] = labels[quad_lane() + i / 2 * 4] == center ? 0x3f800000u : 0u;
    }
  }
};

// The b of a sum: 16 tokens x 16 columns of a tile, as two products of 8 columns; add<0> and add<1>
// do sum += membership * tokens for one of them. IN tile: 16 rows, `stride` bytes apart.
template <typename T>
struct Summands {
  uint32_t values[4];

  __device__ void load(const unsigned char* tile, int stride) {
    load_matrices_transposed(values, matrix_row(tile, stride));
  }
  template <int kTile>
  __device__ void add(float (&sum)[4], const Membership<T>& membership) const {
    multiply_half(sum, membership.values, values[2 * kTile], values[2 * kTile + 1], T{});
  }
};

// A token is the sum of two tf32 values, off by at most 2^-21 of it if the second one is cut off.
template <>
struct Summands<float> {
  uint32_t high[2][4];
  uint32_t low[2][4];

  __device__ void load(const unsigned char* tile, int stride) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto* row = reinterpret_cast<const float*>(tile + (quad_lane() + 4 * i) * stride);
        const float x = row[t * 8 + quad_row()];
        high[t][i] = round_to_tf32(x);
        low[t][i] = __float_as_uint(x - __uint_as_float(high[t][i]));
      }
    }
  }
  template <int kTile>
  __device__ void add(float (&sum)[4], const Membership<float>& membership) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t* ones = membership.values + 4 * step;
      multiply_tf32(sum, ones, low[kTile][2 * step], low[kTile][2 * step + 1]);
      multiply_tf32(sum, ones, high[kTile][2 * step], high[kTile][2 * step + 1]);
    }
  }
};

}  // namespace spt_fast
