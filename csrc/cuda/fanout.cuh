// Fan-out: the one place that knows unicast from multicast.
#pragma once

#include "cuda/ptx.cuh"
#include "protocol/call_params.h"

namespace mnnvl_ar::cuda {

using protocol::Params;

// One-shot: to every other rank. `offset` is the place of source number p.rank, which we are to a multicast and to higher
// ranks; to lower ones we are the source before (protocol::source_of), `source_bytes` ahead.
template <int kRanks>
__device__ __forceinline__ void send_to_others(const Params& p, uint64_t offset, uint32_t source_bytes,
                                               const protocol::Vector& v) {
  if (p.multicast != nullptr) {
    ptx::multimem_store_relaxed_sys(p.multicast + offset, v);
    return;
  }
  const uint32_t higher = p.ranks - 1 - p.rank;  // so many come first in p.peers
  const auto send = [&](uint32_t i) {
    ptx::store_relaxed_sys(p.peers[i] + (i < higher ? offset : offset - source_bytes), v);
  };
  if constexpr (kRanks > 0) {
#pragma unroll
    for (int i = 0; i + 1 < kRanks; ++i) send(i);
  } else {
    for (uint32_t i = 0; i + 1 < p.ranks; ++i) send(i);
  }
}

// To the same place of every rank's block, our own included.
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
