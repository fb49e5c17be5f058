// Waiting is bounded: what happens when something does not come. Nothing here is on the fast path.
//
// Contract
//   * The first thread of a rank to report a fault fills the host's record, then marks its own block and every peer's broken:
//     whoever sees the mark that this rank set finds the record.
//   * A thread that gives up waiting only notes it in its CTA's status; the exit warp reports it.
//   * A broken workspace computes nothing: later calls store NaN and return; calls that wait give up.
#pragma once

#include <cstddef>

#include "kernels/ptx.cuh"
#include "protocol/fault.h"
#include "protocol/params.h"

namespace mnnvl_ar::kernels {

using protocol::FaultCode;
using protocol::Params;

// Polls without a clock before the first look at it: some 0.7 ms.
inline constexpr int kFastPolls = 1024;

__device__ __forceinline__ uint32_t* broken_word(uint8_t* block) {
  return reinterpret_cast<uint32_t*>(block + protocol::kProgressOffset + offsetof(protocol::Progress, broken));
}

// `fault` by value: a reference would put the struct, and with it a stack frame, into every kernel.
static __device__ __noinline__ void report_fault(const Params& p, FaultCode code, protocol::Fault fault) {
  const protocol::Group& g = p.group;
  uint8_t* claimed = g.block + protocol::kProgressOffset + offsetof(protocol::Progress, claimed);
  if (ptx::atomic_cas_relaxed_sys(claimed, 0, 1) != 0) return;  // somebody was first
  volatile protocol::FaultRecord& record = *g.record;
  protocol::fill_record(record, p, fault, ptx::global_timer_ns(), [&g](uint32_t source, uint32_t slot) {
    return ptx::load_relaxed_sys_u32(g.block + protocol::board_offset(slot, source));
  });
  ptx::fence_acq_rel_sys();
  record.code = code;
  ptx::fence_acq_rel_sys();
  ptx::atomic_cas_relaxed_sys(broken_word(g.block), 0, static_cast<uint32_t>(code));
  const uint32_t mark = protocol::peer_mark(g.rank, code);
  for (uint32_t i = 0; i + 1 < g.ranks; ++i) {
    if (code == FaultCode::peer_fault) {  // the rank that found it may have marked that peer already, and knows more
      ptx::atomic_cas_relaxed_sys(broken_word(g.peers[i]), 0, mark);
    } else {
      ptx::store_relaxed_sys_u32(broken_word(g.peers[i]), mark);
    }
  }
  // Before the CTA is counted as finished: a later call that finds it finished must find the mark, or it would send what nobody
  // waits for any more, over rows that a slower peer has still to read (decision 77).
  ptx::fence_acq_rel_sys();
  const volatile protocol::Orders& orders = *g.orders;
  const uint64_t began_ns = ptx::global_timer_ns();
  const auto hold_ns = static_cast<int64_t>(orders.hold_ns);  // signed, as the timer may step back
  while (orders.answered == 0 && static_cast<int64_t>(ptx::global_timer_ns() - began_ns) < hold_ns) __nanosleep(1000);
}

// What the warps of a CTA share about the call.
struct alignas(16) CallStatus {
  uint64_t mbarrier;       // completes once `poisoned` is final: by the entry warp
  uint32_t poisoned;       // non-zero: outputs must be NaN
  uint32_t gave_up;        // FaultCode of a thread that waited too long; the exit warp reports it
  uint64_t began_ns;       // when that thread began to wait
  protocol::Vector entry;  // epoch, vectors to clear, whether the workspace is broken: as the entry warp found them
};

// One look at clock and mark during a long wait; `began_ns` starts as 0. True: give up, and leave the report to the exit warp.
// It is given no RingPosition, so that the loops around it keep their registers.
__device__ __forceinline__ bool must_give_up(const Params& p, CallStatus& status, FaultCode code, uint64_t& began_ns) {
  const uint64_t now_ns = ptx::global_timer_ns();
  if (began_ns == 0) began_ns = now_ns;
  // The first wait that is given up ends all later ones of this CTA: the deadline is the call's, not each wait's.
  if (static_cast<const volatile CallStatus&>(status).gave_up != 0) return true;
  const bool is_marked =
      ptx::load_relaxed_sys_u32(broken_word(p.group.block)) != 0 && !protocol::is_off(p, protocol::Rule::peer_mark);
  const uint64_t deadline_ns = static_cast<const volatile protocol::Orders*>(p.group.orders)->deadline_ns;
  const bool is_bounded = deadline_ns != 0 && !protocol::is_off(p, protocol::Rule::deadline);
  // Signed, since the timer is the device's, not a processor's, and nobody promises that it never steps back.
  const auto waited_ns = static_cast<int64_t>(now_ns - began_ns);
  // A previous call that waits for a peer has begun to before us, and is to say so before we say that it does not end.
  const int64_t patience_ns = code == FaultCode::overlap ? waited_ns / 2 : waited_ns;
  if (!is_marked && !(is_bounded && patience_ns >= static_cast<int64_t>(deadline_ns))) return false;
  status.began_ns = began_ns;
  status.gave_up = static_cast<uint32_t>(is_marked ? FaultCode::peer_fault : code);
  return true;
}

}  // namespace mnnvl_ar::kernels
