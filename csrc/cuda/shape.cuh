// A call runs in the shape that it was planned in, or not at all.
//
// cudaGraphExecUpdate may leave a node's cluster size as it was while it takes the new grid and parameters (seen with driver
// 580 on H200: CTAs found no row of theirs and waited for ever, docs/decisions.md). Only the kernel can notice.
#pragma once

#include "cuda/fault.cuh"
#include "cuda/row.cuh"

namespace mnnvl_ar::cuda {

template <class D>
__device__ __forceinline__ protocol::Vector poison_vector() {
  float nan[D::kPerVector];
#pragma unroll
  for (float& value : nan) value = protocol::as_float(protocol::kPoison);
  return protocol::pack<D>(nan);
}

// kOnce: made for a cluster a row.
template <bool kOnce>
__device__ __forceinline__ bool is_as_planned(const Params& p) {
  return protocol::kBare || ptx::cluster_size() == p.cluster && gridDim.x == p.cluster && gridDim.y == p.clusters &&
                                blockDim.x == p.threads && ptx::cluster_rank() == blockIdx.x &&
                                (!kOnce || p.clusters == p.tokens);
}

// What a call in another shape does, every thread of it: reports, and stores NaN.
template <class D>
static __device__ __noinline__ void refuse(const Params& p) {
  ptx::wait_for_predecessor();
  if (threadIdx.x == 0) {
    const uint32_t epoch = ptx::load_relaxed_gpu(p.block + protocol::kStateOffset).word[0];
    report_fault(p, FaultCode::launch_shape, {epoch, p.rank, 0, 0, ptx::global_timer_ns()});
  }
  const uint64_t vectors = uint64_t{p.tokens} * p.vectors;
  for (uint64_t i = cta_index() * blockDim.x + threadIdx.x; i < vectors; i += grid_size() * blockDim.x) {
    ptx::store(static_cast<uint8_t*>(p.out) + i * protocol::kVectorBytes, poison_vector<D>());
    if (p.residual_out == nullptr) continue;
    ptx::store(static_cast<uint8_t*>(p.residual_out) + i * protocol::kVectorBytes, poison_vector<D>());
  }
}

}  // namespace mnnvl_ar::cuda
