// Fan-out: what goes to several ranks, by unicast or by multicast.
#pragma once

#include "kernels/ptx.cuh"
#include "protocol/params.h"

namespace mnnvl_ar::kernels {

using protocol::Params;

// To the same place of every block. The switch does that; where a test build is given our own block for the address of a multicast,
// this loop: software multicast, in which all but this one instruction runs as with a switch (tests/common/virtual.py).
__device__ __forceinline__ void multicast_store([[maybe_unused]] const Params& p, uint8_t* place,
                                                const protocol::Vector& v) {
#ifdef MNNVL_AR_TEST_BUILD
  if (p.group.multicast == p.group.block) {
    for (uint32_t i = 0; i < p.group.ranks; ++i) {
      ptx::store_relaxed_sys(p.group.peers[i] + (place - p.group.multicast), v);
    }
    return;
  }
#endif
  ptx::multimem_store_relaxed_sys(place, v);
}

// One-shot: to every other rank, where our rank's rows have their place among the sources. A multicast and higher ranks have us
// at number `rank`; for a lower rank, whose own rows have no place, we are one less (protocol::source_of). With two ranks the only
// address is computed by the constructor, before the wait for the predecessor. Called by whole warps.
template <int kRanks>
class Sender {
 public:
  __device__ __forceinline__ Sender(const Params& p, uint32_t source_bytes)
      : p_(p), source_bytes_(source_bytes), only_(kRanks == 2 ? ptx::keep(reinterpret_cast<uint64_t>(only(p))) : 0) {}

  // `offset`: of the slot, and of the vector among the rows that a source sends.
  __device__ __forceinline__ void operator()(uint64_t offset, const protocol::Vector& v) const {
    const uint64_t place = offset + uint64_t{p_.group.rank} * source_bytes_;
    if (p_.group.multicast != nullptr) {
      multicast_store(p_, (kRanks == 2 ? reinterpret_cast<uint8_t*>(only_) : p_.group.multicast) + place, v);
      return;
    }
    if constexpr (kRanks == 2) {
      if (p_.group.ranks == 2) ptx::store_relaxed_sys(reinterpret_cast<uint8_t*>(only_) + offset, v);
    } else {
      const uint32_t higher = p_.group.ranks - 1 - p_.group.rank;  // so many stand first in `peers`
      const auto send = [&](uint32_t i) {
        ptx::store_relaxed_sys(p_.group.peers[i] + (i < higher ? place : place - source_bytes_), v);
      };
      if constexpr (kRanks > 0) {
#pragma unroll
        for (int i = 0; i + 1 < kRanks; ++i) send(i);
      } else {
        for (uint32_t i = 0; i + 1 < p_.group.ranks; ++i) send(i);
      }
    }
  }

 private:
  static __device__ __forceinline__ uint8_t* only(const Params& p) {
    return p.group.multicast != nullptr ? p.group.multicast : p.group.peers[0];
  }

  const Params& p_;
  const uint32_t source_bytes_;
  const uint64_t only_;
};

// To the same place of every rank's block, our own included.
template <int kRanks>
__device__ __forceinline__ void send_to_all(const Params& p, uint64_t offset, const protocol::Vector& v) {
  if (p.group.multicast != nullptr) {
    multicast_store(p, p.group.multicast + offset, v);
    return;
  }
  if constexpr (kRanks > 2) {
#pragma unroll
    for (int i = 0; i < kRanks; ++i) ptx::store_relaxed_sys(p.group.peers[i] + offset, v);
  } else {
    for (uint32_t i = 0; i < p.group.ranks; ++i) ptx::store_relaxed_sys(p.group.peers[i] + offset, v);
  }
}

}  // namespace mnnvl_ar::kernels
