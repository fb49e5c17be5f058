// Waiting for data: poll own memory until every word of the awaited vectors has arrived. Integers only (rule R1).
//
// Contract
//   * receive() returns true with the vectors, or false when it gave up (fault.cuh).
//   * receive_sum() adds what came in rank order to +0 (numerics step 1); after a fault the sum is NaN.
#pragma once

#include "cuda/fault.cuh"
#include "protocol/numerics.h"

namespace mnnvl_ar::cuda {

using protocol::Vector;

// What is sent, in the form it is sent in.
__device__ __forceinline__ Vector for_the_wire(const Params& p, const Vector& v) {
  return protocol::is_off(p, protocol::Rule::sanitize) ? v : protocol::sanitize(v);
}

__device__ __forceinline__ bool has_arrived(const Params& p, const Vector& v) {
#ifdef MNNVL_AR_TEST_BUILD
  if (protocol::is_off(p, protocol::Rule::every_word)) return v.word[0] != protocol::kSentinel;
  if (protocol::is_off(p, protocol::Rule::integer_compare)) {  // what the peers' kernel did, and hung on
    bool arrived = true;
    for (uint32_t word : v.word) {
      uint32_t is_zero;
      asm("{.reg .pred q; setp.eq.ftz.f32 q, %1, 0f00000000; selp.u32 %0, 1, 0, q;}"
          : "=r"(is_zero)
          : "f"(__uint_as_float(word)));
      arrived &= !(is_zero && word >> 31);
    }
    return arrived;
  }
#endif
  return protocol::has_arrived(v);
}

inline constexpr uint32_t kNone = 0xffffffffu;

// The first `count` of kMost vectors, `stride` bytes apart. Number `own` is there already, and has no place among the others.
template <int kMost>
__device__ __forceinline__ bool receive(const Params& p, Verdict& verdict, const uint8_t* first, uint32_t stride,
                                        uint32_t count, Vector (&v)[kMost], uint32_t own = kNone) {
  uint64_t began_ns = 0;
#pragma unroll 1
  for (int tries = 0;; ++tries) {
    bool ready = true;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i < count && i != own) v[i] = ptx::load_relaxed_sys(first + (i - (i > own)) * stride);
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i < count && i != own) ready &= has_arrived(p, v[i]);
    }
    if (ready) return true;
    if (tries >= kFastPolls && must_give_up(p, verdict, FaultCode::peer_timeout, began_ns)) return false;
  }
}

inline constexpr int kChunk = 4;  // peers awaited at once where the number of ranks is not known at compile time

// Of all ranks, in rank order; number `own` is `mine`. kRanks 0: p.ranks of them, in chunks.
template <class D, int kRanks>
__device__ __forceinline__ Vector receive_sum(const Params& p, Verdict& verdict, const uint8_t* first, uint32_t stride,
                                              uint32_t own = kNone, const Vector& mine = {}) {
  float sum[D::kPerVector] = {};
  bool ok = true;
  if constexpr (kRanks > 0) {
    Vector v[kRanks];
#pragma unroll
    for (Vector& each : v) each = mine;
    ok = receive<kRanks>(p, verdict, first, stride, kRanks, v, own);
#pragma unroll
    for (int i = 0; i < kRanks; ++i) protocol::accumulate<D>(sum, v[i]);
  } else {
    for (uint32_t rank = 0; rank < p.ranks; rank += kChunk) {
      Vector v[kChunk];
#pragma unroll
      for (Vector& each : v) each = mine;
      const uint32_t count = min(p.ranks - rank, static_cast<uint32_t>(kChunk));
      ok &= receive<kChunk>(p, verdict, first + (rank - (rank > own)) * stride, stride, count, v, own - rank);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (i < count) protocol::accumulate<D>(sum, v[i]);
      }
    }
  }
  if (!ok) {
#pragma unroll
    for (float& value : sum) value = protocol::as_float(protocol::kPoison);
  }
  return protocol::pack<D>(sum);
}

}  // namespace mnnvl_ar::cuda
