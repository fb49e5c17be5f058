// A call's place in the ring, and the two warps of each CTA that have no rows and keep the books, side by side, since each
// step takes a latency (docs/protocol.md, "A call", steps 1, 2, 4, 5 and 7): the usher reads the state, lets the CTA's other
// warps in, counts the CTA in, advances the state, lets the next call in, and compares signatures; the steward signs, clears,
// and counts the CTA out.
//
// Contract
//   * enter() is what a warp does first behind the wait for the kernel ahead. All threads of a launch get the same epoch.
//   * keep_books() is all that those two warps do. It needs the warps with rows to barrier_arrive on kCleared after their last
//     store to the stale slot and on kReceived after their last load from the current one.
//   * Dependents are triggered only after the state has been advanced.
#pragma once

#include "cuda/fault.cuh"
#include "cuda/row.cuh"
#include "protocol/ring.h"

namespace mnnvl_ar::cuda {

// What all threads of a CTA do before anything else: sets up what they share, for the other CTAs of the cluster to see too.
template <class Shared>
__device__ __forceinline__ void prepare_cta(const Lane& lane, Verdict& verdict, Shared& shared) {
  if (threadIdx.x == 0) {
    verdict.poisoned = verdict.gave_up = 0;
    ptx::mbarrier_init(ptx::shared_address(&verdict.mbarrier), 1);
  }
  shared.init(lane);
  ptx::mbarrier_init_fence();
  // What peers in the cluster touch are mbarriers, which that fence is for, and words that only they write.
  __syncthreads();
  ptx::cluster_sync_relaxed();
}

struct Call {
  uint32_t epoch;
  uint32_t dirty;       // vectors to clear in the stale slot
  uint64_t slot;        // offset of this call's slot in every block
  uint64_t stale_slot;  // offset of the slot to clear in our own
  bool broken;          // compute nothing
};

#ifdef MNNVL_AR_TEST_BUILD
// Sleeps up to sabotage.delay_ns, differently at each step, CTA, rank and call.
static __device__ __noinline__ void stumble(const Params& p, uint32_t step) {
  if (p.sabotage.delay_seed == 0) return;
  uint32_t h = p.sabotage.delay_seed ^ step * 0x9e3779b9u ^ cta_index() * 0x85ebca6bu ^ p.rank * 0xc2b2ae35u;
  h ^= static_cast<uint32_t>(ptx::global_timer_ns());
  h = (h ^ h >> 15) * 0x2c1b3c6du;
  h = (h ^ h >> 12) * 0x297a2d39u;
  h ^= h >> 15;
  if (h & 3u) return;  // mostly not, so that ranks differ
  const uint64_t until = ptx::global_timer_ns() + (h >> 2) % p.sabotage.delay_ns;
  while (ptx::global_timer_ns() < until) __nanosleep(200);
}
#else
__device__ __forceinline__ void stumble(const Params&, uint32_t) {}
#endif

// Whether every CTA of earlier calls has finished. CTAs of this call may have finished too, before this one started; each of
// them has seen the same.
__device__ __forceinline__ bool is_quiescent(const protocol::Vector& state, const protocol::Vector& progress) {
  return static_cast<int32_t>(progress.word[0] - state.word[1]) >= 0;
}

__device__ __forceinline__ bool await_quiescence(const Params& p, Verdict& verdict, const uint8_t* state,
                                                 const uint8_t* progress) {
  uint64_t began_ns = 0;
  for (;;) {
    const protocol::Vector s = ptx::load_relaxed_gpu(state), g = ptx::load_relaxed_gpu(progress);
    if (is_quiescent(s, g)) return true;
    if (must_give_up(p, verdict, FaultCode::overlap, began_ns)) return false;
  }
}

// By the usher: reads the state, and lets the other warps in. One reader a CTA, so that its warps cannot be in different calls,
// the CTA can be counted in at once, and a large grid does not crowd one line of L2 (docs/performance.md). All of the CTA is in
// line behind it, so what it needs is made up before the kernel ahead has ended. By whole warps.
class Opener {
 public:
  __device__ __forceinline__ Opener(const Params& p, Verdict& verdict)
      : block_(ptx::keep(reinterpret_cast<uint64_t>(p.block))),
        entry_(ptx::keep(ptx::shared_address(&verdict.entry))) {}

  // Returns the CTAs of all earlier calls.
  __device__ __forceinline__ uint32_t open(const Params& p, Verdict& verdict, Call& call) const {
    const auto* block = reinterpret_cast<const uint8_t*>(block_);
    const uint8_t *state = block + protocol::kStateOffset, *progress = block + protocol::kProgressOffset;
    const protocol::Vector s = ptx::load_relaxed_gpu(state), g = ptx::load_relaxed_gpu(progress);
    bool broken = g.word[1] != 0 && !protocol::is_off(p, protocol::Rule::told);
    // One load of one address: all lanes go the same way. What lane 0 finds is what counts.
    if (!is_quiescent(s, g) && !protocol::is_off(p, protocol::Rule::quiescence)) {
      broken |= !await_quiescence(p, verdict, state, progress);
    }
    if (threadIdx.x % 32 == 0) ptx::store_shared(entry_, {{s.word[0], s.word[2], broken, 0}});
    __syncwarp();
    ptx::barrier_arrive(kEntered, blockDim.x);
    call = Call{.epoch = __shfl_sync(0xffffffffu, s.word[0], 0), .broken = __shfl_sync(0xffffffffu, broken, 0) != 0};
    return s.word[1];
  }

 private:
  const uint64_t block_;
  const uint32_t entry_;
};

// By all other warps.
__device__ __forceinline__ Call enter(const Params& p, const Verdict& verdict) {
  ptx::barrier_sync(kEntered, blockDim.x);
  const protocol::Vector entry = ptx::load_shared_vector(ptx::shared_address(&verdict.entry));
  Call call{.epoch = entry.word[0], .dirty = entry.word[1], .broken = entry.word[2] != 0};
  uint32_t slot = protocol::slot_of(call.epoch), stale = protocol::slot_to_clear(call.epoch);
#ifdef MNNVL_AR_TEST_BUILD
  if (protocol::is_off(p, protocol::Rule::three_slots)) slot = call.epoch % 2, stale = 1 - slot;
  if (protocol::is_off(p, protocol::Rule::device_epoch)) {
    slot = protocol::slot_of(p.sabotage.frozen_epoch), stale = protocol::slot_to_clear(p.sabotage.frozen_epoch);
  }
  if (protocol::is_off(p, protocol::Rule::device_dirty)) call.dirty = p.sabotage.frozen_dirty;
  if (protocol::is_off(p, protocol::Rule::clear)) call.dirty = 0;
#endif
  call.slot = protocol::slot_offset(slot, p.slot_bytes);
  call.stale_slot = protocol::slot_offset(stale, p.slot_bytes);
  return call;
}

// Up to this many vectors a CTA, the steward clears alone, while the others poll; it is off their way then.
inline constexpr uint32_t kStewardClears = 1024;

__device__ __forceinline__ bool steward_clears(const Call& call) { return call.dirty <= kStewardClears * grid_size(); }

// Fills every `stride`th vector of the stale slot, from `first` up to `end`, with the sentinel.
__device__ __forceinline__ void clear(const Params& p, const Call& call, uint32_t first, uint32_t end,
                                      uint32_t stride) {
  const protocol::Vector empty = protocol::sentinel_vector();
  for (uint32_t i = first; i < end; i += stride) {
    ptx::store(p.block + call.stale_slot + uint64_t{i} * protocol::kVectorBytes, empty);
  }
}

// By the threads with rows: step number `step` of the `steps` that this CTA takes (others may take more, or fewer) to clear its
// share of what the steward leaves to them. Then they pass kCleared.
__device__ __forceinline__ void clear_step(const Params& p, const Call& call, uint32_t step, uint32_t steps) {
  const uint32_t threads = blockDim.x - kOtherWarps * 32;
  if (!call.broken && !steward_clears(call)) {
    const uint32_t stride = grid_size() * threads, part = (call.dirty / (stride * steps) + 1) * stride;
    const uint32_t first = cta_index() * threads + threadIdx.x + step * part;
    clear(p, call, first, min(first + part, call.dirty), stride);
  }
  if (step + 1 == steps) ptx::barrier_arrive(kCleared, threads + 32);
}

// Waits for the signature of one rank. False: it differs, or did not come; the fault has been reported.
__device__ __forceinline__ bool peer_agrees(const Params& p, Verdict& verdict, const Call& call, uint32_t source) {
  if (protocol::is_off(p, protocol::Rule::signature)) return true;
  const uint8_t* place = p.block + protocol::board_offset(protocol::slot_of(call.epoch), source);
  uint64_t began_ns = 0;
  for (int tries = 0;; ++tries) {
    const protocol::Vector seen = ptx::load_relaxed_sys(place);
    if (protocol::is_signature_of(seen, call.epoch)) {
      if (protocol::agrees(seen, p.tokens, p.description)) return true;
      report_fault(p, FaultCode::call_mismatch,
                   {call.epoch, source, seen.word[1], seen.word[3], ptx::global_timer_ns()});
      return false;
    }
    if (tries >= kFastPolls && must_give_up(p, verdict, FaultCode::peer_timeout, began_ns)) return false;
  }
}

// Counts this CTA in; the last one advances the state. False: it is not this call's alone.
__device__ __forceinline__ bool arrive(const Params& p, const Call& call, uint32_t launched, uint32_t dirty) {
  stumble(p, 1);
  auto* state = reinterpret_cast<protocol::State*>(p.block + protocol::kStateOffset);
  const uint32_t mine = protocol::arrival(call.epoch, p.launch);
  const uint32_t before = ptx::atomic_add_relaxed_gpu(&state->arrived, mine);
  const uint32_t count = protocol::arrivals(before);
  const bool is_watched = !protocol::is_off(p, protocol::Rule::two_at_once);
  bool alone = !is_watched || protocol::is_one_call(before, mine);
  const bool is_last = protocol::is_off(p, protocol::Rule::advance_last) ? count == 0 : count + 1 == grid_size();
  if (is_last && alone) {
    const protocol::Vector next{{protocol::next_epoch(call.epoch), launched + grid_size(), dirty, 0}};
    // Using what was there makes what follows wait until the state has been advanced.
    const protocol::Vector last = ptx::exchange_relaxed_gpu(state, next);
    alone = !is_watched || (last.word[0] == call.epoch && last.word[1] == launched);
  }
  return alone;
}

// Writes our signature into every peer's board: one CTA's steward does. It leaves no later than the data, so that no peer waits
// for it when it has those: where it goes is made up before the kernel ahead has ended. By whole warps.
class Signer {
 public:
  __device__ __forceinline__ explicit Signer(const Params& p) : board_(ptx::keep(first_board(p))) {}

  __device__ __forceinline__ void sign(const Params& p, const Call& call) const {
    if (cta_index() != 0 || call.broken) return;
    const protocol::Vector mine = protocol::signature(call.epoch, p.tokens, p.description);
    const uint64_t place = protocol::board_offset(protocol::slot_of(call.epoch), p.rank);
    if (board_ != 0) ptx::store_relaxed_sys(reinterpret_cast<uint8_t*>(board_) + place, mine);
#pragma unroll 1
    for (uint32_t i = threadIdx.x % 32 + 32; i < p.ranks; i += 32) ptx::store_relaxed_sys(p.peers[i] + place, mine);
  }

 private:
  static __device__ __forceinline__ uint64_t first_board(const Params& p) {
    const uint32_t lane = threadIdx.x % 32;
    return lane < p.ranks ? reinterpret_cast<uint64_t>(p.peers[lane]) : 0;
  }

  const uint64_t board_;
};

__device__ __forceinline__ void usher_duty(const Params& p, const Opener& opener, uint32_t dirty, Verdict& verdict) {
  const uint32_t lane = threadIdx.x % 32;
  Call call;
  const uint32_t launched = opener.open(p, verdict, call);
  bool ok = !call.broken;
  if (ok) {
    if (lane == 0) {
      ok = arrive(p, call, launched, dirty);
      if (!ok) report_fault(p, FaultCode::two_at_once, {call.epoch, p.rank, 0, 0, ptx::global_timer_ns()});
    }
    __syncwarp();
    if (p.trigger_early) ptx::trigger_dependents();
    for (uint32_t source = lane; source < p.ranks; source += 32) ok &= peer_agrees(p, verdict, call, source);
  }
  if (!__all_sync(0xffffffffu, ok)) verdict.poisoned = 1;
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&verdict.mbarrier));
  ptx::barrier_arrive(kReceived, blockDim.x);  // counted in before it is counted out
}

__device__ __forceinline__ void steward_duty(const Params& p, const Call& call, Verdict& verdict) {
  const uint32_t lane = threadIdx.x % 32;
  // Our CTA's clears, and the fence behind them, before anybody can learn that we have finished.
  const bool clears = steward_clears(call) && !call.broken;
  if (clears) {
    clear(p, call, cta_index() * 32 + lane, call.dirty, grid_size() * 32);
    __syncwarp();
    if (lane == 0) ptx::fence_acq_rel_gpu();
  }
  ptx::barrier_sync(kCleared, blockDim.x - 32);
  if (!clears && lane == 0) ptx::fence_acq_rel_gpu();
  ptx::barrier_sync(kReceived, blockDim.x);
  if (lane == 0) {
    const auto& fault = static_cast<const volatile Verdict&>(verdict);
    const uint32_t gave_up = fault.gave_up;
    if (gave_up != 0 || call.broken) {  // or else it was broken before we came, and the host is to know
      const FaultCode code = gave_up != 0 ? static_cast<FaultCode>(gave_up) : FaultCode::peer_fault;
      const uint64_t began_ns = gave_up != 0 ? fault.began_ns : ptx::global_timer_ns();
      report_fault(p, code, {call.epoch, protocol::kMaxRanks, 0, 0, began_ns});
    }
    stumble(p, 2);
    ptx::reduce_add_relaxed_gpu(p.block + protocol::kProgressOffset + offsetof(protocol::Progress, finished), 1);
  }
}

// `dirty`: vectors that this call will leave in its slot.
__device__ __forceinline__ void keep_books(const Params& p, const Lane& lane, uint32_t dirty, Verdict& verdict) {
  if (lane.role == Role::usher) {
    const Opener opener(p, verdict);
    if (threadIdx.x % 32 == 0) ptx::prefetch_to_l2(p.block + protocol::kStateOffset);
    ptx::wait_for_predecessor();
    stumble(p, 5);
    return usher_duty(p, opener, dirty, verdict);
  }
  const Signer signer(p);
  ptx::wait_for_predecessor();
  const Call call = enter(p, verdict);
  signer.sign(p, call);
  steward_duty(p, call, verdict);
}

// The verdict, for the warps with rows. A look in time saves the wait: look(), compute, is_poisoned().
class VerdictWait {
 public:
  __device__ __forceinline__ explicit VerdictWait(const Verdict& verdict)
      : here_(ptx::keep(ptx::shared_address(&verdict))) {}

  __device__ __forceinline__ void look() {
    if (protocol::kBare) return;
    is_known_ = ptx::mbarrier_test_cta(here_ + offsetof(Verdict, mbarrier), 0);
    poisoned_ = ptx::load_shared(here_ + offsetof(Verdict, poisoned));
  }

  __device__ __forceinline__ bool is_poisoned() {
    if (protocol::kBare) return false;
    if (!is_known_) {
      ptx::mbarrier_wait_cta(here_ + offsetof(Verdict, mbarrier), 0);
      poisoned_ = ptx::load_shared(here_ + offsetof(Verdict, poisoned));
      is_known_ = true;
    }
    return poisoned_ != 0;
  }

 private:
  const uint32_t here_;
  bool is_known_ = false;
  uint32_t poisoned_ = 0;
};

}  // namespace mnnvl_ar::cuda
