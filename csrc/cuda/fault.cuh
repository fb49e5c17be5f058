// Waiting is bounded: what happens when something does not come. Nothing here is on the fast path.
//
// Contract
//   * The first thread of a rank to find a fault writes the host's record, marks its own block and every peer's broken.
//   * Threads with rows only note that they gave up; their CTA's steward reports.
//   * A broken workspace computes nothing: later calls store NaN and return; calls that wait give up.
#pragma once

#include "cuda/ptx.cuh"
#include "protocol/call_params.h"

namespace mnnvl_ar::cuda {

using protocol::FaultCode;
using protocol::Params;

// Polls without a clock before the first look at it: some 0.7 ms.
inline constexpr int kFastPolls = 1024;

__device__ __forceinline__ uint32_t* broken_word(uint8_t* block) {
  return reinterpret_cast<uint32_t*>(block + protocol::kProgressOffset + offsetof(protocol::Progress, broken));
}

static __device__ __noinline__ void report_fault(const Params& p, FaultCode code, uint32_t epoch, uint64_t began_ns,
                                                 uint32_t peer, uint32_t peer_tokens, uint32_t peer_description) {
  if (ptx::atomic_cas_relaxed_sys(broken_word(p.block), 0, static_cast<uint32_t>(code)) != 0 &&
      code != FaultCode::peer_fault) {
    return;  // somebody was first
  }
  volatile protocol::FaultRecord& record = *p.record;
  if (record.code != 0) return;
  for (uint32_t source = 0; source < p.ranks; ++source) {
    uint32_t newest = protocol::kNoEpoch;
    for (uint32_t slot = 0; slot < protocol::kSlots; ++slot) {
      const uint32_t sent = ptx::load_relaxed_sys_u32(p.block + protocol::board_offset(slot, source));
      if (sent != protocol::kNoEpoch && (newest == protocol::kNoEpoch || protocol::epoch_distance(newest, sent) > 0)) {
        newest = sent;
      }
    }
    record.last_epoch[source] = newest;
    if (peer >= p.ranks && source != p.rank &&
        (newest == protocol::kNoEpoch || protocol::epoch_distance(newest, epoch) > 0)) {
      peer = source;
    }
  }
  record.rank = p.rank;
  record.epoch = epoch;
  record.tokens = p.tokens;
  record.description = p.description;
  record.peer = peer;
  record.peer_tokens = peer_tokens;
  record.peer_description = peer_description;
  record.began_ns = began_ns;
  record.ended_ns = ptx::global_timer_ns();
  ptx::fence_acq_rel_sys();
  record.code = static_cast<uint32_t>(code);
  for (uint32_t i = 0; i + 1 < p.ranks; ++i) {
    ptx::store_relaxed_sys_u32(broken_word(p.peers[i]), static_cast<uint32_t>(FaultCode::peer_fault));
  }
}

// What the warps of a CTA share about the call.
struct Verdict {
  uint64_t mbarrier;  // completes once `poisoned` is final
  uint32_t poisoned;  // non-zero: outputs must be NaN
  uint32_t gave_up;   // FaultCode of a thread that waited too long; the steward reports it
  uint64_t began_ns;  // when that thread began to wait
};

// One look while waiting long; `began_ns` starts as 0. True: give up, and leave the report to the steward. Holds no call, so
// that the loops it stands in keep their registers.
__device__ __forceinline__ bool must_give_up(const Params& p, Verdict& verdict, FaultCode code, uint64_t& began_ns) {
  const uint64_t now_ns = ptx::global_timer_ns();
  if (began_ns == 0) began_ns = now_ns;
  const bool told = ptx::load_relaxed_sys_u32(broken_word(p.block)) != 0;
  const bool bounded = p.deadline_ns != 0 && !protocol::is_off(p, protocol::Rule::deadline);
  if (!told && !(bounded && now_ns - began_ns >= p.deadline_ns)) return false;
  verdict.began_ns = began_ns;
  verdict.gave_up = static_cast<uint32_t>(told ? FaultCode::peer_fault : code);
  return true;
}

}  // namespace mnnvl_ar::cuda
