// The kernels of the second read alone, which are compiled in seconds for any architecture.
#include "kmeans_cuda_accumulate.cuh"
#include "kmeans_cuda_reduce.cuh"

namespace spt_fast {

template __global__ void accumulate_kernel<float, true>(Problem, Sort);
template __global__ void accumulate_kernel<float, false>(Problem, Sort);
template __global__ void accumulate_kernel<__half, true>(Problem, Sort);
template __global__ void accumulate_kernel<__half, false>(Problem, Sort);
template __global__ void accumulate_kernel<__nv_bfloat16, true>(Problem, Sort);
template __global__ void accumulate_kernel<__nv_bfloat16, false>(Problem, Sort);

}  // namespace spt_fast
