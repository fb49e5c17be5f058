// The exit warp of each CTA: it sets up what a reduction over the row needs, signs the call in every peer's board (one CTA's exit
// warp does), clears the stale slot where that is little, stores what pads outputs, reports what a thread gave up for, and counts
// the CTA out.
//
// Contract
//   * The CTA's clears, and a fence behind them, come before it is counted out: whoever learns that the call has finished finds the
//     slot clear. A light call, which lets nothing start before it has ended and clears little, has no fence: what comes behind the
//     end of the kernel finds its clears (docs/protocol.md, "Two kinds of call").
//   * With multicast, our clears and what peers store later come to one memory by two addresses: that fence is one of aliases, too
//     (docs/multicast.md).
#pragma once

#include "epilogues/epilogue.h"
#include "kernels/call.cuh"

namespace mnnvl_ar::kernels {

// Writes our signatures into every peer's boards. They leave no later than the data, so that no peer that has those waits for
// them: the addresses are computed before the wait for the predecessor. By the whole warp.
template <bool kNormed>
class Signer {
 public:
  __device__ __forceinline__ explicit Signer(const Params& p) : board_(ptx::keep(first_board(p))) {}

  __device__ __forceinline__ void sign(const Params& p, const RingPosition& ring) const {
    if (cta_index() != 0 || ring.broken) return;
    const uint64_t place = protocol::board_offset(protocol::slot_of(ring.epoch), p.group.rank);
    if (board_ != 0) sign_one(p, ring, reinterpret_cast<uint8_t*>(board_) + place);
#pragma unroll 1
    for (uint32_t i = threadIdx.x % 32 + 32; i < p.group.ranks; i += 32) sign_one(p, ring, p.group.peers[i] + place);
  }

 private:
  static __device__ __forceinline__ void sign_one(const Params& p, const RingPosition& ring, uint8_t* place) {
    const protocol::Tensors& t = p.tensors;
    ptx::store_halves_relaxed_sys(place, protocol::signature(ring.epoch, t.call_tokens, t.description));
    if (!kNormed) return;
    ptx::store_halves_relaxed_sys(place + protocol::kOneBoardBytes,
                                  protocol::signature(ring.epoch, t.numbers.eps, t.numbers.weight_bias));
  }

  static __device__ __forceinline__ uint64_t first_board(const Params& p) {
    const uint32_t lane = threadIdx.x % 32;
    return lane < p.group.ranks ? reinterpret_cast<uint64_t>(p.group.peers[lane]) : 0;
  }

  const uint64_t board_;
};

template <class E, class Shared>
__device__ __forceinline__ void run_exit_warp(const epilogues::CallOf<E>& p, const Lane& where, CallStatus& status,
                                              Shared& shared) {
  const uint32_t lane = threadIdx.x % 32;
  shared.init(where);
  Shared::join_cluster();
  const Signer<E::kNormed> signer(p);
  ptx::wait_for_predecessor();
  const RingPosition ring = enter(p, status);
  signer.sign(p, ring);

  const bool clears_alone = exit_warp_clears(ring);
  if (!clears_alone) {
    ptx::barrier_sync(kCleared, blockDim.x - 32);
  } else if (!ring.broken) {
    clear(p, ring, cta_index() * 32 + lane, ring.dirty, grid_size() * 32);
    __syncwarp();
  }
  if (!protocol::is_off(p, protocol::Rule::padding)) {
    epilogues::pad<E>(p.arguments, p.tensors, cta_index() * 32 + lane, grid_size() * 32);
  }
  const bool is_light = clears_alone && !p.launch.trigger_early;
  if (!is_light && lane == 0) {
    if (p.group.multicast != nullptr) ptx::fence_proxy_alias();
    ptx::fence_acq_rel_gpu();
  }
  ptx::barrier_sync(kReceived, blockDim.x);
  if (lane == 0) {
    const auto& fault = static_cast<const volatile CallStatus&>(status);
    const uint32_t gave_up = fault.gave_up;
    if (gave_up != 0 || ring.broken) {  // broken before we came: the host is to know, too
      const FaultCode code = gave_up != 0 ? static_cast<FaultCode>(gave_up) : FaultCode::peer_fault;
      const uint64_t began_ns = gave_up != 0 ? fault.began_ns : ptx::global_timer_ns();
      report_fault(p, code, {ring.epoch, protocol::kMaxRanks, 0, 0, began_ns});
    }
    random_delay(p, Step::count_out);
    ptx::reduce_add_relaxed_gpu(p.group.block + protocol::kProgressOffset + offsetof(protocol::Progress, finished), 1);
  }
}

}  // namespace mnnvl_ar::kernels
