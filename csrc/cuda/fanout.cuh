// Fan-out: the one place that knows unicast from multicast. A vector goes to the same position of every rank's block, our
// own included, so that what is awaited is awaited alike from every rank.
#pragma once

#include "cuda/ptx.cuh"
#include "protocol/call_params.h"

namespace mnnvl_ar::cuda {

using protocol::Params;

template <int kRanks>
__device__ __forceinline__ void send_to_all(const Params& p, uint64_t offset, const protocol::Vector& v) {
  if (p.multicast != nullptr) {
    ptx::multimem_store_relaxed_sys(p.multicast + offset, v);
    return;
  }
  if constexpr (kRanks > 0) {
#pragma unroll
    for (int i = 0; i < kRanks; ++i) ptx::store_relaxed_sys(p.peers[i] + offset, v);
  } else {
    for (uint32_t i = 0; i < p.ranks; ++i) ptx::store_relaxed_sys(p.peers[i] + offset, v);
  }
}

// Rank `rank`'s block: peers are kept in rotated order, so that ranks do not all send to rank 0 first.
__device__ __forceinline__ uint8_t* block_of(const Params& p, uint32_t rank) {
  const uint32_t ahead = rank + p.ranks - p.rank - 1;
  return p.peers[ahead >= p.ranks ? ahead - p.ranks : ahead];
}

}  // namespace mnnvl_ar::cuda
