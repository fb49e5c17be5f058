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

// What a call learns of the ring before it does anything.
struct RingWords {
  protocol::Vector state, progress;
};

__device__ __forceinline__ RingWords read_ring(const uint8_t* block) {
  return {ptx::load_relaxed_gpu(block + protocol::kStateOffset),
          ptx::load_relaxed_gpu(block + protocol::kProgressOffset)};
}

// The same, only if `wanted`.
__device__ __forceinline__ void read_ring_if(bool wanted, const uint8_t* block, RingWords& words) {
  ptx::load_relaxed_gpu_if(wanted, block + protocol::kStateOffset, words.state);
  ptx::load_relaxed_gpu_if(wanted, block + protocol::kProgressOffset, words.progress);
}

// Whether an earlier call has left the ring broken.
__device__ __forceinline__ bool is_broken(const Params& p, const protocol::Vector& progress) {
  return progress.word[1] != 0 && !protocol::is_off(p, protocol::Rule::peer_mark);
}

// False: earlier calls did not finish before the deadline, or one of them broke the ring while this one waited.
__device__ __forceinline__ bool await_quiescence(const Params& p, CallStatus& status) {
  uint64_t began_ns = 0;
  for (;;) {
    const RingWords now = read_ring(p.group.block);
    if (is_quiescent(now.state, now.progress)) return !is_broken(p, now.progress);
    if (must_give_up(p, status, FaultCode::overlap, began_ns)) return false;
  }
}

// Lets the other warps in, and sets `status` up before that. By the whole warp, whose lanes have all read the same words: they go the
// same way, and what lane 0 finds is what counts.
__device__ __forceinline__ RingPosition open_ring(const Params& p, CallStatus& status, RingWords& words,
                                                  RingWords& late) {
  if (threadIdx.x % 32 == 0) {  // while the words are on their way
    status.poisoned = status.gave_up = 0;
    ptx::mbarrier_init(ptx::shared_address(&status.mbarrier), 1);
  }
  __syncwarp();
  ptx::not_before(words.state);
  ptx::not_before(words.progress);
  if (p.launch.programmatic) words = late;
  const protocol::Vector &state = words.state, &progress = words.progress;
  bool broken = is_broken(p, progress);
  if (!is_quiescent(state, progress) && !protocol::is_off(p, protocol::Rule::quiescence)) {
    broken |= !await_quiescence(p, status);
  }
  if (threadIdx.x % 32 == 0) {
    // The last word says nothing. With no use its register would be given away while the words are on their way, and whoever
    // gets it would wait for them.
    ptx::store_shared(ptx::shared_address(&status.entry), {{state.word[0], state.word[2], broken, state.word[3]}});
  }
  __syncwarp();
  ptx::barrier_arrive(kEntered, blockDim.x);
  return {.epoch = __shfl_sync(0xffffffffu, state.word[0], 0), .broken = __shfl_sync(0xffffffffu, broken, 0) != 0};
}

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

// Waits for the signatures of another rank. False: one differs, or did not come; the fault has been reported or noted.
template <bool kNormed>
__device__ __forceinline__ bool peer_agrees(const Params& p, const uint8_t* block, CallStatus& status,
                                            const RingPosition& ring, uint32_t source) {
  if (protocol::is_off(p, protocol::Rule::signature)) return true;
  const uint8_t* place = block + protocol::board_offset(protocol::slot_of(ring.epoch), source);
  uint64_t began_ns = 0;
  for (int tries = 0;; ++tries) {
    const protocol::Vector call = ptx::load_halves_relaxed_sys(place);
    const protocol::Vector numbers =
        kNormed ? ptx::load_halves_relaxed_sys(place + protocol::kOneBoardBytes) : protocol::Vector{};
    const protocol::Tensors& t = p.tensors;
    const protocol::Signed found =
        protocol::compare<kNormed>(ring.epoch, call, numbers, t.call_tokens, t.description, t.numbers);
    if (found == protocol::Signed::alike) return true;
    if (found == protocol::Signed::differs) {
      report_fault(p, FaultCode::call_mismatch,
                   {ring.epoch, source, call.word[1], call.word[3], ptx::global_timer_ns(),
                    protocol::numbers_of<kNormed>(numbers, ring.epoch, t.numbers)});
      return false;
    }
    if (tries >= kFastPolls && must_give_up(p, status, FaultCode::peer_timeout, began_ns)) return false;
  }
}

// `dirty`: vectors that this call will leave in its slot. `words`: of the ring, where they could be read at once. kNormed: calls
// sign the numbers of their norm.
template <bool kNormed>
__device__ __forceinline__ void run_entry_warp(const Params& p, uint32_t dirty, CallStatus& status, RingWords words) {
  const uint32_t lane = threadIdx.x % 32;
  uint8_t* const block = reinterpret_cast<uint8_t*>(ptx::keep(reinterpret_cast<uint64_t>(p.group.block)));
  if (p.launch.programmatic) {
    if (lane == 0) ptx::prefetch_to_l2(block + protocol::kStateOffset);
    ptx::wait_for_predecessor();
    random_delay(p, Step::read_state);
  }
  RingWords late{};
  read_ring_if(p.launch.programmatic, block, late);
  const RingPosition ring = open_ring(p, status, words, late);
  bool ok = !ring.broken;
  if (ok) {
    if (lane == 0) {
      ok = count_in(p, block, ring, words.state.word[1], dirty);
      if (!ok) report_fault(p, FaultCode::two_at_once, {ring.epoch, p.group.rank, 0, 0, ptx::global_timer_ns()});
      if (p.tensors.first_token != 0 && cta_index() == 0) {
        uint8_t* const later = block + protocol::kProgressOffset + offsetof(protocol::Progress, later);
        ptx::reduce_inc_relaxed_gpu(later, protocol::kEpochs - 1);
      }
    }
    __syncwarp();
    if (p.launch.trigger_early) ptx::trigger_dependents();
    for (uint32_t source = lane; source < p.group.ranks; source += 32) {
      if (source != p.group.rank) ok &= peer_agrees<kNormed>(p, block, status, ring, source);
    }
  }
  if (!__all_sync(0xffffffffu, ok)) status.poisoned = 1;
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&status.mbarrier));
  ptx::barrier_arrive(kReceived, blockDim.x);  // counted in before the exit warp counts the CTA out
}

}  // namespace mnnvl_ar::kernels
