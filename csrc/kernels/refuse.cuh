// A call runs in the shape that it was planned in, or not at all.
//
// cudaGraphExecUpdate may leave a node's cluster size as it was while it takes the new grid and parameters (seen with driver
// 580 on H200: CTAs found no row of theirs and waited for ever, decision 19). Only the kernel can notice.
#pragma once

#include "epilogues/epilogue.h"
#include "kernels/fault.cuh"
#include "kernels/row.cuh"

namespace mnnvl_ar::kernels {

// kOnce: made for a cluster a row.
template <bool kOnce>
__device__ __forceinline__ bool is_as_planned(const Params& p) {
  const protocol::Launch& l = p.launch;
  return protocol::kBare || ptx::cluster_size() == l.shape.cluster && gridDim.x == l.shape.cluster &&
                                gridDim.y == l.clusters && blockDim.x == l.threads &&
                                ptx::cluster_rank() == blockIdx.x && (!kOnce || l.clusters == p.tensors.tokens);
}

// What a call in another shape does, every thread of it: reports, and stores NaN.
template <class D, class E>
static __device__ __noinline__ void refuse(const epilogues::CallOf<E>& p) {
  ptx::wait_for_predecessor();
  if (threadIdx.x == 0) {
    const uint32_t epoch = ptx::load_relaxed_gpu(p.group.block + protocol::kStateOffset).word[0];
    report_fault(p, FaultCode::launch_shape, {epoch, p.group.rank, 0, 0, ptx::global_timer_ns()});
  }
  epilogues::pad<E>(p.arguments, p.tensors, cta_index() * blockDim.x + threadIdx.x, grid_size() * blockDim.x);
  const uint32_t vectors = p.tensors.vectors;
  for (uint32_t row = cta_index(); row < p.tensors.tokens; row += grid_size()) {
    for (uint32_t vector = threadIdx.x; vector < vectors; vector += blockDim.x) {
      epilogues::store_poison<E, D>(p.arguments, p.tensors, {row, vector, vector_offset(p, row, vector)});
    }
  }
}

}  // namespace mnnvl_ar::kernels
