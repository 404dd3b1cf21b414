// The few PTX instructions of the k-means kernels, and how a kernel is enqueued; sm_80 and later.
//
// tests/ops/cuda_emulation/cuda_intrinsics.cuh is the twin that runs them on a CPU; it is found
// first there. Whatever the kernels need beyond CUDA C++ is here, so that the twin stays complete.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace spt_fast {

// The block's dynamic shared memory.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies the first `bytes` (0 to 16) of 16 from device to shared memory, the rest as zeros. Other
// threads see them after wait_copies() of the copying thread and a barrier.
__device__ inline void copy_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// Ends a group of copies, which may be empty.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `kPending` of this thread's newest groups are under way.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit values. Lane 8i + r gives the address of row r of matrix i; lane l
// receives in out[i] values 2(l % 4) and 2(l % 4) + 1 of row l / 4.
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed on the way.
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b for a 16 x 16 and b 16 x 8, the tensor core's fragment layouts for m16n8k16.
__device__ inline void multiply_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b for a 16 x 8 and b 8 x 8 in tf32, the layouts of m16n8k8. Bits below tf32's are ignored.
__device__ inline void multiply_tf32(float (&c)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 0xffff in each half where `a` and `b` hold equal float16 values, else zero. 0xffff, a NaN, equals
// nothing.
__device__ inline uint32_t equal_halves(uint32_t a, uint32_t b) {
  uint32_t mask;
  asm("set.eq.u32.f16x2 %0, %1, %2;\n" : "=r"(mask) : "r"(a), "r"(b));
  return mask;
}

// Keeps the compiler from unpacking a loop's values before the loop, where they take more
// registers.
template <typename Piece>
__device__ inline void keep_packed(Piece&) {}
__device__ inline void keep_packed(uint4& piece) {
  asm volatile("" : "+r"(piece.x), "+r"(piece.y), "+r"(piece.z), "+r"(piece.w));
}

// Enqueues kernel(args...).
template <typename... Params, typename... Args>
cudaError_t enqueue(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
                    cudaStream_t stream, Args... args) {
  kernel<<<grid, threads, shared_bytes, stream>>>(static_cast<Params>(args)...);
  return cudaGetLastError();
}

}  // namespace spt_fast
