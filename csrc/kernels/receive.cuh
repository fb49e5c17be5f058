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

// Where the number of ranks is not known at compile time: sources awaited at once, all of whose loads are under way before the first
// is looked at; and how many of them stand and fall together where there are fewer.
inline constexpr uint32_t kChunk = 16, kPart = 4;

// What is not loaded of a chunk: number `own` is `mine`. The others begin as +0, and stay that behind the last source, which no sum
// that began with +0 can show. (Without a value on every way to the loads v would hold its registers all through the kernel.)
__device__ __forceinline__ void begin_chunk(uint32_t own, const Vector& mine, Vector (&v)[kChunk]) {
  forget(v);
#pragma unroll
  for (uint32_t part = 0; part < kChunk; part += kPart) {
    if (own - part >= kPart) continue;  // unsigned
#pragma unroll
    for (uint32_t k = part; k < part + kPart; ++k) {
      if (k == own) v[k] = mine;
    }
  }
}

// One vector of each of `count` sources, up to kChunk, `stride` bytes apart, into what has been begun. Number `own` has no place among
// the others.
__device__ __forceinline__ bool receive_chunk(const Params& p, CallStatus& status, const uint8_t* first,
                                              uint32_t stride, uint32_t count, uint32_t own, Vector (&v)[kChunk]) {
  uint64_t began_ns = 0;
#pragma unroll 1
  for (int tries = 0;; ++tries) {
    const uint8_t* place = first;
#pragma unroll
    for (uint32_t part = 0; part < kChunk; part += kPart) {
      if (part >= count) break;
#pragma unroll
      for (uint32_t k = part; k < part + kPart; ++k) {
        if (k >= count || k == own) continue;
        v[k] = ptx::load_relaxed_sys(place);
        place += stride;
      }
    }
    bool ready = true;
#pragma unroll
    for (uint32_t part = 0; part < kChunk; part += kPart) {
      if (part >= count) break;
#pragma unroll
      for (uint32_t k = part; k < part + kPart; ++k) ready &= has_arrived(p, v[k]);
    }
    if (ready) return true;
    if (tries >= kFastPolls && must_give_up(p, status, FaultCode::peer_timeout, began_ns)) return false;
  }
}

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

// Of all ranks, in rank order; number `own` is `mine`. The first `columns` of kColumns. kRanks 0: p.group.ranks of them, in chunks, and
// `before_look` is called once, when all is ready for the first look.
template <class D, int kRanks, int kColumns, class BeforeLook>
__device__ __forceinline__ bool receive_sum(const Params& p, CallStatus& status, const uint8_t* first, uint32_t stride,
                                            uint32_t columns, uint32_t own, const Vector (&mine)[kColumns],
                                            Vector (&s)[kColumns], const BeforeLook& before_look) {
  if constexpr (kRanks == 2) {
    if (own != kNone) return receive_other<D>(p, status, first, columns, mine, s);
  }
  float sum[kColumns][D::kPerVector] = {};
  bool ok = true;
  if constexpr (kRanks > 0) {
#pragma unroll 1
    for (uint32_t rank = 0; rank < 1;
         rank += kRanks) {  // once; spelled without a loop it compiles to other instructions
      const uint32_t count = kRanks > 2 ? kRanks : min(p.group.ranks - rank, static_cast<uint32_t>(kRanks));
      Vector v[kRanks * kColumns];
#pragma unroll
      for (int k = 0; k < kRanks * kColumns; ++k) v[k] = mine[k % kColumns];
      ok &= receive<kRanks, kColumns>(p, status, first + (rank - (rank > own)) * stride, stride, count, columns, v,
                                      own - rank);
#pragma unroll
      for (int k = 0; k < kRanks * kColumns; ++k) {
        if (k / kColumns < count) protocol::accumulate<D>(sum[k % kColumns], v[k]);
      }
    }
  } else {
    static_assert(kColumns == 1);  // launch/form.h
    Vector v[kChunk];
    begin_chunk(own, mine[0], v);
    before_look();
#pragma unroll 1
    for (uint32_t rank = 0;;) {
      const uint32_t count = min(p.group.ranks - rank, kChunk);
      ok &= receive_chunk(p, status, first + (rank - (rank > own)) * stride, stride, count, own - rank, v);
#pragma unroll
      for (uint32_t part = 0; part < kChunk; part += kPart) {
        if (part >= count) break;
#pragma unroll
        for (uint32_t k = part; k < part + kPart; ++k) protocol::accumulate<D>(sum[0], v[k]);
      }
      rank += kChunk;
      if (rank >= p.group.ranks) break;
      begin_chunk(own - rank, mine[0], v);
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
