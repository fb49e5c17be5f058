// Waiting for data: poll own memory until every word of the awaited vectors has arrived. Integers only (rule R1).
//
// Contract
//   * receive() returns true with the vectors, or false when it gave up (fault.cuh).
//   * receive_sum() adds what came in rank order to +0 (numerics step 1); after a fault it returns false, and the sum is NaN.
#pragma once

#include "kernels/fault.cuh"
#include "kernels/row.cuh"
#include "protocol/numerics.h"

namespace mnnvl_ar::kernels {

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

// The first `count` of kMost vectors, `stride` bytes apart, and of each the first `columns` of kColumns, a group apart. Number
// `own` is there already, and has no place among the others.
template <int kMost, int kColumns>
__device__ __forceinline__ bool receive(const Params& p, CallStatus& status, const uint8_t* first, uint32_t stride,
                                        uint32_t count, uint32_t columns, Vector (&v)[kMost * kColumns],
                                        uint32_t own = kNone) {
  uint64_t began_ns = 0;
#pragma unroll 1
  for (int tries = 0;; ++tries) {
    bool ready = true;
#pragma unroll
    for (int k = 0; k < kMost * kColumns; ++k) {
      const int i = k / kColumns, column = k % kColumns;
      if (i < count && i != own && column < columns) {
        v[k] = ptx::load_relaxed_sys(first + (i - (i > own)) * stride + column * kGroupBytes);
      }
    }
#pragma unroll
    for (int k = 0; k < kMost * kColumns; ++k) {
      const int i = k / kColumns, column = k % kColumns;
      if (i < count && i != own && column < columns) ready &= has_arrived(p, v[k]);
    }
    if (ready) return true;
    if (tries >= kFastPolls && must_give_up(p, status, FaultCode::peer_timeout, began_ns)) return false;
  }
}

inline constexpr int kChunk = 4;  // peers awaited at once where the number of ranks is not known at compile time

// Two ranks, and one of them is us: what is ours is added before the other's has come. The order of two makes no difference to
// any bit (0 + a is not -0, and NaN is NaN). Of a world of one rank nothing is awaited: then the other's is 0.
template <class D, int kColumns>
__device__ __forceinline__ bool receive_other(const Params& p, CallStatus& status, const uint8_t* first,
                                              uint32_t columns, const Vector (&mine)[kColumns], Vector (&s)[kColumns]) {
  float sum[kColumns][D::kPerVector] = {};
#pragma unroll
  for (int column = 0; column < kColumns; ++column) protocol::accumulate<D>(sum[column], mine[column]);
  bool ok = true;
  if (p.group.ranks > 1) {
    ok = receive<1, kColumns>(p, status, first, 0, 1, columns, s);
  } else {
#pragma unroll
    for (Vector& v : s) v = Vector{};
  }
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    protocol::accumulate<D>(sum[column], s[column]);
    if (!ok) {
#pragma unroll
      for (float& value : sum[column]) value = protocol::as_float(protocol::kPoison);
    }
    s[column] = protocol::pack<D>(sum[column]);
  }
  return ok;
}

// Of all ranks, in rank order; number `own` is `mine`. The first `columns` of kColumns. kRanks 0: p.group.ranks of them, in chunks.
template <class D, int kRanks, int kColumns>
__device__ __forceinline__ bool receive_sum(const Params& p, CallStatus& status, const uint8_t* first, uint32_t stride,
                                            uint32_t columns, uint32_t own, const Vector (&mine)[kColumns],
                                            Vector (&s)[kColumns]) {
  if constexpr (kRanks == 2) {
    if (own != kNone) return receive_other<D>(p, status, first, columns, mine, s);
  }
  constexpr int kMost = kRanks > 0 ? kRanks : kChunk;
  float sum[kColumns][D::kPerVector] = {};
  bool ok = true;
#pragma unroll 1
  for (uint32_t rank = 0; rank < (kRanks > 0 ? 1 : p.group.ranks); rank += kMost) {
    const uint32_t count = kRanks > 2 ? kRanks : min(p.group.ranks - rank, static_cast<uint32_t>(kMost));
    Vector v[kMost * kColumns];
#pragma unroll
    for (int k = 0; k < kMost * kColumns; ++k) v[k] = mine[k % kColumns];
    ok &= receive<kMost, kColumns>(p, status, first + (rank - (rank > own)) * stride, stride, count, columns, v,
                                   own - rank);
#pragma unroll
    for (int k = 0; k < kMost * kColumns; ++k) {
      if (k / kColumns < count) protocol::accumulate<D>(sum[k % kColumns], v[k]);
    }
  }
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    if (!ok) {
#pragma unroll
      for (float& value : sum[column]) value = protocol::as_float(protocol::kPoison);
    }
    s[column] = protocol::pack<D>(sum[column]);
  }
  return ok;
}

}  // namespace mnnvl_ar::kernels
