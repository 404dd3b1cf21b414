// The kernels of the second read alone, which are compiled in seconds for any architecture.
#include "kmeans_cuda_accumulate.cuh"
#include "kmeans_cuda_reduce.cuh"

namespace spt_fast {

template __global__ void accumulate_kernel<float, float>(Problem, Sort);
template __global__ void accumulate_kernel<float, uint4>(Problem, Sort);
template __global__ void accumulate_kernel<__half, __half>(Problem, Sort);
template __global__ void accumulate_kernel<__half, uint4>(Problem, Sort);
template __global__ void accumulate_kernel<__nv_bfloat16, __nv_bfloat16>(Problem, Sort);
template __global__ void accumulate_kernel<__nv_bfloat16, uint4>(Problem, Sort);

}  // namespace spt_fast
