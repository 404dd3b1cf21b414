// The few PTX instructions of the k-means kernels, and how a kernel is launched; sm_80 and later.
//
// tests/ops/cuda_emulation/cuda_intrinsics.cuh is the twin that runs them on a CPU; it is found first
// there. Whatever the kernels need beyond CUDA C++ is here, so that the twin stays complete.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace spt_fast {

// The block's dynamic shared memory, aligned as the swizzled matrices of warpgroups want it.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
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

// The same for 4 bytes, `bytes` being 0 to 4.
__device__ inline void copy_async_4(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)),
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
template <typename T>
__device__ inline void multiply_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1);

template <>
__device__ inline void multiply_half<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply_half<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
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

// The nearest tf32 value, as float32.
__device__ inline uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
}

// What follows up to the launches is Hopper's own, sm_90a; other architectures get none of it.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SPT_HAS_WARPGROUPS 1

// Shared memory of a block of the cluster: `pointer` is of this block, the result the same place
// in block `rank`.
struct ClusterPointer {
  uint32_t address;
};
__device__ inline ClusterPointer in_block(const void* pointer, int rank) {
  ClusterPointer mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n"
      : "=r"(mapped.address)
      : "r"(shared_address(pointer)), "r"(rank));
  return mapped;
}

// Seen by the other block after cluster_arrive() here and cluster_wait() there.
__device__ inline void store_remote(ClusterPointer target, uint16_t value) {
  asm volatile("st.shared::cluster.u16 [%0], %1;\n" ::"r"(target.address), "h"(value) : "memory");
}
__device__ inline void store_remote(ClusterPointer target, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;\n" ::"r"(target.address), "r"(value) : "memory");
}
__device__ inline void store_remote(ClusterPointer target, uint2 value) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};\n" ::"r"(target.address), "r"(value.x),
               "r"(value.y)
               : "memory");
}
__device__ inline void store_remote(ClusterPointer target, uint4 value) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(target.address),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// The two halves of a barrier of all threads of the cluster.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// Makes this thread's writes to shared memory visible to products of warpgroups that are started
// after the next barrier.
__device__ inline void show_to_warpgroups() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Before a product whose registers the threads have touched.
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
// Ends a group of products, which may be empty.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Waits until at most `kPending` of the newest groups are under way.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// A matrix in shared memory, rows of 128 bytes whose 16-byte pieces are permuted: piece p of row r
// is at p ^ (r % 8). `start` may point 32, 64 or 96 bytes into the first row. Groups of eight rows
// are 1024 bytes apart; `next_columns`: bytes to the 64 columns that follow (used only where
// products run along the rows).
__device__ inline uint64_t swizzled_matrix(const void* start, int next_columns) {
  constexpr uint64_t kSwizzle128 = 1;
  constexpr uint64_t kNextRows = 1024 >> 4;
  return kSwizzle128 << 62 | kNextRows << 32 | static_cast<uint64_t>(next_columns >> 4) << 16 |
         (shared_address(start) >> 4 & 0x3fff);
}

// The matrix that starts `bytes` further on.
__device__ inline uint64_t advance(uint64_t matrix, int bytes) {
  return matrix + static_cast<uint64_t>(bytes >> 4);
}

// For each of two 16-bit numbers: one where they are equal, else zero; the sum.
__device__ inline uint32_t equal_ones(uint32_t a, uint32_t b, __nv_bfloat16) {
  const __nv_bfloat162 ones = __heq2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                     *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&ones);
}
__device__ inline uint32_t equal_ones(uint32_t a, uint32_t b, __half) {
  const __half2 ones =
      __heq2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&ones);
}
__device__ inline uint32_t add_pairs(uint32_t a, uint32_t b, __nv_bfloat16) {
  const __nv_bfloat162 sums = __hadd2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                      *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&sums);
}
__device__ inline uint32_t add_pairs(uint32_t a, uint32_t b, __half) {
  const __half2 sums =
      __hadd2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&sums);
}

#define SPT_SUM4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define SPT_SUM16(i) SPT_SUM4(i), SPT_SUM4(i + 4), SPT_SUM4(i + 8), SPT_SUM4(i + 12)
#define SPT_NAMES16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SPT_NAMES28 SPT_NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27"
#define SPT_NAMES32 SPT_NAMES28 ", %28, %29, %30, %31"

// sum = a b^T, or sum += a b^T, one step of 16 columns: a of 64 rows, b of twice as many rows as a
// thread has sums. Both are swizzled_matrix() in rows of 64 values. Started, not awaited. In warp w
// of the four, sum[4j + 2h + c] is row 16 w + lane / 4 + 8 h, column 8 j + 2 (lane % 4) + c.
#define SPT_MULTIPLY_SHARED(Type, type, columns, names, sums, a_name, b_name, add_name, ...)     \
  __device__ inline void multiply_shared(float (&sum)[sums], uint64_t a, uint64_t b, bool add,   \
                                         Type) {                                                 \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_name                                \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names \
                 "}, " a_name ", " b_name ", add, 1, 1, 0, 0;\n}\n"                              \
                 : __VA_ARGS__                                                                   \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                  \
  }
#define SPT_MULTIPLY_SHARED_ALL(Type, type)                                                 \
  SPT_MULTIPLY_SHARED(Type, type, "32", SPT_NAMES16, 16, "%16", "%17", "%18", SPT_SUM16(0)) \
  SPT_MULTIPLY_SHARED(Type, type, "56", SPT_NAMES28, 28, "%28", "%29", "%30", SPT_SUM16(0), \
                      SPT_SUM4(16), SPT_SUM4(20), SPT_SUM4(24))                             \
  SPT_MULTIPLY_SHARED(Type, type, "64", SPT_NAMES32, 32, "%32", "%33", "%34", SPT_SUM16(0), \
                      SPT_SUM16(16))
SPT_MULTIPLY_SHARED_ALL(__nv_bfloat16, "bf16")
SPT_MULTIPLY_SHARED_ALL(__half, "f16")

// sum += a b for 64 columns of b, a step of 16 rows of b: a of 64 rows in registers, those of warp
// w as in multiply_half's a, b a swizzled_matrix(). Started, not awaited; `sum` as above.
#define SPT_MULTIPLY_REGISTERS(Type, type)                                                        \
  __device__ inline void multiply_registers(float (&sum)[32], const uint32_t (&a)[4], uint64_t b, \
                                            Type) {                                               \
    asm volatile(                                                                                 \
        "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                            \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" SPT_NAMES32              \
        "}, "                                                                                     \
        "{%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}\n"                                           \
        : SPT_SUM16(0), SPT_SUM16(16)                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                    \
  }
SPT_MULTIPLY_REGISTERS(__nv_bfloat16, "bf16")
SPT_MULTIPLY_REGISTERS(__half, "f16")
#endif  // sm_90a

// More than 48 KiB of shared memory has to be asked for.
template <typename... Params>
cudaError_t allow_shared_memory(void (*kernel)(Params...), int bytes) {
  if (bytes <= 48 << 10) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Enqueues kernel(args...).
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
                   cudaStream_t stream, Args... args) {
  const cudaError_t status = allow_shared_memory(kernel, shared_bytes);
  if (status != cudaSuccess) return status;
  kernel<<<grid, threads, shared_bytes, stream>>>(static_cast<Params>(args)...);
  return cudaGetLastError();
}

// The same in clusters of `blocks` neighbouring blocks; sm_90 and later.
template <typename... Params, typename... Args>
cudaError_t launch_clusters(void (*kernel)(Params...), dim3 grid, int blocks, int threads,
                            int shared_bytes, cudaStream_t stream, Args... args) {
  const cudaError_t status = allow_shared_memory(kernel, shared_bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace spt_fast
