// The entry warp of each CTA: it alone reads the ring's state, lets the other warps in, counts the CTA in, advances the state, lets
// dependents start, and compares the peers' signatures.
//
// One reader a CTA, so that its warps cannot be in different calls, the CTA can be counted in at once, and a large grid does not
// crowd one line of L2 (decision 33). All other warps wait for it, so the addresses it needs are computed before the wait
// for the predecessor.
//
// Contract
//   * Dependents are triggered only after the state has been advanced.
//   * CallStatus::mbarrier completes once it is known whether outputs must be NaN; kReceived is passed after that.
#pragma once

#include "kernels/call.cuh"

namespace mnnvl_ar::kernels {

// Whether every CTA of earlier calls has finished. CTAs of this call may have finished too, before this one started; each of
// them has seen the same.
__device__ __forceinline__ bool is_quiescent(const protocol::Vector& state, const protocol::Vector& progress) {
  return static_cast<int32_t>(progress.word[0] - state.word[1]) >= 0;
}

__device__ __forceinline__ bool await_quiescence(const Params& p, CallStatus& status, const uint8_t* state,
                                                 const uint8_t* progress) {
  uint64_t began_ns = 0;
  for (;;) {
    const protocol::Vector s = ptx::load_relaxed_gpu(state), g = ptx::load_relaxed_gpu(progress);
    if (is_quiescent(s, g)) return true;
    if (must_give_up(p, status, FaultCode::overlap, began_ns)) return false;
  }
}

// Reads the state and lets the other warps in. By the whole warp.
class StateReader {
 public:
  __device__ __forceinline__ StateReader(const Params& p, CallStatus& status)
      : block_(ptx::keep(reinterpret_cast<uint64_t>(p.group.block))),
        entry_(ptx::keep(ptx::shared_address(&status.entry))) {}

  // The rank's own block.
  __device__ __forceinline__ uint8_t* block() const { return reinterpret_cast<uint8_t*>(block_); }

  // Returns the CTAs of all earlier calls.
  __device__ __forceinline__ uint32_t open(const Params& p, CallStatus& status, RingPosition& ring) const {
    const uint8_t *state = block() + protocol::kStateOffset, *progress = block() + protocol::kProgressOffset;
    const protocol::Vector s = ptx::load_relaxed_gpu(state), g = ptx::load_relaxed_gpu(progress);
    bool broken = g.word[1] != 0 && !protocol::is_off(p, protocol::Rule::peer_mark);
    // One load of one address: all lanes go the same way. What lane 0 finds is what counts.
    if (!is_quiescent(s, g) && !protocol::is_off(p, protocol::Rule::quiescence)) {
      broken |= !await_quiescence(p, status, state, progress);
    }
    if (threadIdx.x % 32 == 0) ptx::store_shared(entry_, {{s.word[0], s.word[2], broken, 0}});
    __syncwarp();
    ptx::barrier_arrive(kEntered, blockDim.x);
    ring = RingPosition{.epoch = __shfl_sync(0xffffffffu, s.word[0], 0),
                        .broken = __shfl_sync(0xffffffffu, broken, 0) != 0};
    return s.word[1];
  }

 private:
  const uint64_t block_;
  const uint32_t entry_;
};

// Counts this CTA in; the last one advances the state. False: CTAs of another call counted themselves in, too.
__device__ __forceinline__ bool count_in(const Params& p, uint8_t* block, const RingPosition& ring, uint32_t launched,
                                         uint32_t dirty) {
  random_delay(p, Step::count_in);
  auto* state = reinterpret_cast<protocol::State*>(block + protocol::kStateOffset);
  const uint32_t mine = protocol::arrival(ring.epoch, p.launch.number);
  const uint32_t before = ptx::atomic_add_relaxed_gpu(&state->arrived, mine);
  const uint32_t count = protocol::arrivals(before);
  const bool is_watched = !protocol::is_off(p, protocol::Rule::two_at_once);
  // A full count is another call's: ours would not have had room for this CTA.
  bool alone = !is_watched || (protocol::is_one_call(before, mine) && count < grid_size());
  const bool is_last = protocol::is_off(p, protocol::Rule::advance_last) ? count == 0 : count + 1 == grid_size();
  if (is_last && alone) {
    const protocol::Vector next{{protocol::next_epoch(ring.epoch), launched + grid_size(), dirty, 0}};
    // Using what was there makes what follows wait until the state has been advanced.
    const protocol::Vector last = ptx::exchange_relaxed_gpu(state, next);
    alone = !is_watched || (last.word[0] == ring.epoch && last.word[1] == launched);
  }
  return alone;
}

// Waits for the signatures of one rank. False: one differs, or did not come; the fault has been reported or noted.
template <bool kNormed>
__device__ __forceinline__ bool peer_agrees(const Params& p, const uint8_t* block, CallStatus& status,
                                            const RingPosition& ring, uint32_t source) {
  if (protocol::is_off(p, protocol::Rule::signature)) return true;
  const uint8_t* place = block + protocol::board_offset(protocol::slot_of(ring.epoch), source);
  uint64_t began_ns = 0;
  for (int tries = 0;; ++tries) {
    const protocol::Vector seen = ptx::load_halves_relaxed_sys(place);
    const protocol::Vector numbers =
        kNormed ? ptx::load_halves_relaxed_sys(place + protocol::kOneBoardBytes) : protocol::Vector{};
    if (protocol::is_signature_of(seen, ring.epoch)) {
      bool differs = !protocol::agrees(seen, p.tensors.call_tokens, p.tensors.description);
      const bool are_there = kNormed && protocol::is_signature_of(numbers, ring.epoch);
      if (are_there) differs |= !protocol::agrees(numbers, p.tensors.numbers.eps, p.tensors.numbers.weight_bias);
      if (differs) {
        report_fault(p, FaultCode::call_mismatch,
                     {ring.epoch, source, seen.word[1], seen.word[3], ptx::global_timer_ns(),
                      are_there ? protocol::Numbers{numbers.word[1], numbers.word[3]} : protocol::Numbers{}});
        return false;
      }
      if (are_there || !kNormed) return true;
    }
    if (tries >= kFastPolls && must_give_up(p, status, FaultCode::peer_timeout, began_ns)) return false;
  }
}

// `dirty`: vectors that this call will leave in its slot. kNormed: calls sign the numbers of their norm.
template <bool kNormed>
__device__ __forceinline__ void run_entry_warp(const Params& p, uint32_t dirty, CallStatus& status) {
  const uint32_t lane = threadIdx.x % 32;
  const StateReader reader(p, status);
  if (lane == 0) ptx::prefetch_to_l2(p.group.block + protocol::kStateOffset);
  ptx::wait_for_predecessor();
  random_delay(p, Step::read_state);
  RingPosition ring;
  const uint32_t launched = reader.open(p, status, ring);
  bool ok = !ring.broken;
  if (ok) {
    if (lane == 0) {
      ok = count_in(p, reader.block(), ring, launched, dirty);
      if (!ok) report_fault(p, FaultCode::two_at_once, {ring.epoch, p.group.rank, 0, 0, ptx::global_timer_ns()});
      if (p.tensors.first_token != 0 && cta_index() == 0) {
        uint8_t* const later = reader.block() + protocol::kProgressOffset + offsetof(protocol::Progress, later);
        ptx::reduce_inc_relaxed_gpu(later, protocol::kEpochs - 1);
      }
    }
    __syncwarp();
    if (p.launch.trigger_early) ptx::trigger_dependents();
    for (uint32_t source = lane; source < p.group.ranks; source += 32)
      ok &= peer_agrees<kNormed>(p, reader.block(), status, ring, source);
  }
  if (!__all_sync(0xffffffffu, ok)) status.poisoned = 1;
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&status.mbarrier));
  ptx::barrier_arrive(kReceived, blockDim.x);  // counted in before the exit warp counts the CTA out
}

}  // namespace mnnvl_ar::kernels
