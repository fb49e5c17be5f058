// Waiting is bounded: what happens when something does not come. Nothing here is on the fast path.
//
// Contract
//   * The first thread of a rank to report a fault writes the host's record, then marks its own block and every peer's broken:
//     whoever sees the mark that we set finds the record.
//   * Who gives up waiting only notes it; its CTA's steward reports.
//   * A broken workspace computes nothing: later calls store NaN and return; calls that wait give up.
#pragma once

#include "cuda/row.cuh"
#include "protocol/fault_record.h"

namespace mnnvl_ar::cuda {

using protocol::FaultCode;
using protocol::Params;

// Polls without a clock before the first look at it: some 0.7 ms.
inline constexpr int kFastPolls = 1024;

__device__ __forceinline__ uint32_t* broken_word(uint8_t* block) {
  return reinterpret_cast<uint32_t*>(block + protocol::kProgressOffset + offsetof(protocol::Progress, broken));
}

// By value: a reference would put the struct, and with it a stack frame, into every kernel.
static __device__ __noinline__ void report_fault(const Params& p, FaultCode code, protocol::Fault fault) {
  uint8_t* claimed = p.block + protocol::kProgressOffset + offsetof(protocol::Progress, claimed);
  if (ptx::atomic_cas_relaxed_sys(claimed, 0, 1) != 0) return;  // somebody was first
  volatile protocol::FaultRecord& record = *p.record;
  protocol::fill_record(record, p, fault, ptx::global_timer_ns(), [&p](uint32_t source, uint32_t slot) {
    return ptx::load_relaxed_sys_u32(p.block + protocol::board_offset(slot, source));
  });
  ptx::fence_acq_rel_sys();
  record.code = static_cast<uint32_t>(code);
  ptx::fence_acq_rel_sys();
  ptx::atomic_cas_relaxed_sys(broken_word(p.block), 0, static_cast<uint32_t>(code));
  const uint32_t mark = protocol::told(p.rank, static_cast<uint32_t>(code));
  for (uint32_t i = 0; i + 1 < p.ranks; ++i) {
    if (code == FaultCode::peer_fault) {  // who found it may have told that peer already, and knows more
      ptx::atomic_cas_relaxed_sys(broken_word(p.peers[i]), 0, mark);
    } else {
      ptx::store_relaxed_sys_u32(broken_word(p.peers[i]), mark);
    }
  }
}

// What the warps of a CTA share about the call.
struct alignas(16) Verdict {
  uint64_t mbarrier;       // completes once `poisoned` is final: the usher's verdict
  uint32_t poisoned;       // non-zero: outputs must be NaN
  uint32_t gave_up;        // FaultCode of a thread that waited too long; the steward reports it
  uint64_t began_ns;       // when that thread began to wait
  protocol::Vector entry;  // the call's epoch, what to clear, whether it is broken: as the usher found it
};

// One look while waiting long; `began_ns` starts as 0. True: give up, and leave the report to the steward. Holds no call, so
// that the loops it stands in keep their registers.
__device__ __forceinline__ bool must_give_up(const Params& p, Verdict& verdict, FaultCode code, uint64_t& began_ns) {
  const uint64_t now_ns = ptx::global_timer_ns();
  if (began_ns == 0) began_ns = now_ns;
  // Waits follow each other in a call, and its CTA ends them all with the first: the deadline is the call's, not each wait's.
  if (static_cast<const volatile Verdict&>(verdict).gave_up != 0) return true;
  const bool told = ptx::load_relaxed_sys_u32(broken_word(p.block)) != 0 && !protocol::is_off(p, protocol::Rule::told);
  const bool bounded = p.deadline_ns != 0 && !protocol::is_off(p, protocol::Rule::deadline);
  if (!told && !(bounded && now_ns - began_ns >= p.deadline_ns)) return false;
  verdict.began_ns = began_ns;
  verdict.gave_up = static_cast<uint32_t>(told ? FaultCode::peer_fault : code);
  return true;
}

}  // namespace mnnvl_ar::cuda
