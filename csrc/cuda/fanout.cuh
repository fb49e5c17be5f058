// Fan-out: what goes to several ranks, by unicast or by multicast.
#pragma once

#include "cuda/ptx.cuh"
#include "protocol/call_params.h"

namespace mnnvl_ar::cuda {

using protocol::Params;

// One-shot: to every other rank, where source number p.rank has its place. That is our place to a multicast and to higher ranks;
// to lower ones we are the source before (protocol::source_of). Of two ranks, where to is made up here, before the kernel ahead
// has ended. By whole warps.
template <int kRanks>
class Sender {
 public:
  __device__ __forceinline__ Sender(const Params& p, uint32_t source_bytes)
      : p_(p), source_bytes_(source_bytes), only_(kRanks == 2 ? ptx::keep(reinterpret_cast<uint64_t>(only(p))) : 0) {}

  // `offset`: of the slot, and in what a source sends.
  __device__ __forceinline__ void operator()(uint64_t offset, const protocol::Vector& v) const {
    const uint64_t place = offset + uint64_t{p_.rank} * source_bytes_;
    if (p_.multicast != nullptr) {
      ptx::multimem_store_relaxed_sys((kRanks == 2 ? reinterpret_cast<uint8_t*>(only_) : p_.multicast) + place, v);
      return;
    }
    if constexpr (kRanks == 2) {
      ptx::store_relaxed_sys(reinterpret_cast<uint8_t*>(only_) + offset, v);
    } else {
      const uint32_t higher = p_.ranks - 1 - p_.rank;  // so many come first in p.peers
      const auto send = [&](uint32_t i) {
        ptx::store_relaxed_sys(p_.peers[i] + (i < higher ? place : place - source_bytes_), v);
      };
      if constexpr (kRanks > 0) {
#pragma unroll
        for (int i = 0; i + 1 < kRanks; ++i) send(i);
      } else {
        for (uint32_t i = 0; i + 1 < p_.ranks; ++i) send(i);
      }
    }
  }

 private:
  static __device__ __forceinline__ uint8_t* only(const Params& p) {
    return p.multicast != nullptr ? p.multicast : p.peers[0];
  }

  const Params& p_;
  const uint32_t source_bytes_;
  const uint64_t only_;
};

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
