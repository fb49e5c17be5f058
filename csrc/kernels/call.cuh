// A call's place in the ring (docs/protocol.md, "A call"), as every warp of a CTA sees it.
//
// Contract
//   * The entry warp alone reads the ring's state (entry_warp.cuh). enter() is what all other warps do first behind the wait for the
//     predecessor; all threads of a launch get the same epoch.
//   * What a CTA shares is set up by its warps without rows, before they pass kEntered: nobody waits for it where a plain edge has
//     put the start of a call in line.
//   * Where the exit warp does not clear alone, every warp with rows passes kCleared, by its last clear_step(), after its last store to
//     the stale slot. Every one arrives on kReceived after its last load from the current slot. The exit warp waits for both.
#pragma once

#include "kernels/fault.cuh"
#include "kernels/row.cuh"
#include "protocol/ring.h"

namespace mnnvl_ar::kernels {

struct RingPosition {
  uint32_t epoch;
  uint32_t dirty;       // vectors to clear in the stale slot
  uint64_t slot;        // offset of this call's slot in every block
  uint32_t stale_slot;  // number of the slot to clear in our own
  bool broken;          // compute nothing
};

// Where a test build delays CTAs at random.
enum class Step : uint32_t { count_in = 1, count_out = 2, before_wait = 3, enter = 4, read_state = 5 };

#ifdef MNNVL_AR_TEST_BUILD
// Sleeps up to sabotage.delay_ns, differently at each step, CTA, rank and call.
static __device__ __noinline__ void random_delay(const Params& p, Step step) {
  if (p.sabotage.delay_seed == 0) return;
  uint32_t h = p.sabotage.delay_seed ^ static_cast<uint32_t>(step) * 0x9e3779b9u ^ cta_index() * 0x85ebca6bu ^
               p.group.rank * 0xc2b2ae35u;
  h ^= static_cast<uint32_t>(ptx::global_timer_ns());
  h = (h ^ h >> 15) * 0x2c1b3c6du;
  h = (h ^ h >> 12) * 0x297a2d39u;
  h ^= h >> 15;
  if (h & 3u) return;  // mostly not, so that ranks differ
  const uint64_t until = ptx::global_timer_ns() + (h >> 2) % p.sabotage.delay_ns;
  while (ptx::global_timer_ns() < until) __nanosleep(200);
}
#else
__device__ __forceinline__ void random_delay(const Params&, Step) {}
#endif

// By all warps but the entry warp: waits until that has read the state, and computes where this call's slots are.
__device__ __forceinline__ RingPosition enter(const Params& p, const CallStatus& status) {
  ptx::barrier_sync(kEntered, blockDim.x);
  const protocol::Vector entry = ptx::load_shared_vector(ptx::shared_address(&status.entry));
  RingPosition ring{.epoch = entry.word[0], .dirty = entry.word[1], .broken = entry.word[2] != 0};
  uint32_t slot = protocol::slot_of(ring.epoch), stale = protocol::slot_to_clear(ring.epoch);
#ifdef MNNVL_AR_TEST_BUILD
  if (protocol::is_off(p, protocol::Rule::three_slots)) slot = ring.epoch % 2, stale = 1 - slot;
  if (protocol::is_off(p, protocol::Rule::device_epoch)) {
    slot = protocol::slot_of(p.sabotage.frozen_epoch), stale = protocol::slot_to_clear(p.sabotage.frozen_epoch);
  }
  if (protocol::is_off(p, protocol::Rule::device_dirty)) ring.dirty = p.sabotage.frozen_dirty;
  if (protocol::is_off(p, protocol::Rule::clear)) ring.dirty = 0;
#endif
  ring.slot = protocol::slot_offset(slot, p.group.slot_bytes);
  ring.stale_slot = stale;
  return ring;
}

// Up to this many vectors a CTA, the exit warp clears alone, while the others poll: no store of theirs is delayed then.
inline constexpr uint32_t kExitWarpClears = 1024;

__device__ __forceinline__ bool exit_warp_clears(const RingPosition& ring) {
  return ring.dirty <= kExitWarpClears * grid_size();
}

// Fills every `stride`th vector of the stale slot, from `first` up to `end`, with the sentinel.
__device__ __forceinline__ void clear(const Params& p, const RingPosition& ring, uint32_t first, uint32_t end,
                                      uint32_t stride) {
  const protocol::Vector empty = protocol::sentinel_vector();
  uint8_t* const slot = p.group.block + protocol::slot_offset(ring.stale_slot, p.group.slot_bytes);
  for (uint32_t i = first; i < end; i += stride) ptx::store(slot + uint64_t{i} * protocol::kVectorBytes, empty);
}

// By the warps with rows: step `step` of the `steps` in which this CTA clears its share of what the exit warp leaves to them. Other
// CTAs may take more steps, or fewer. With the last step they pass kCleared, if anything was left to them.
__device__ __forceinline__ void clear_step(const Params& p, const RingPosition& ring, uint32_t step, uint32_t steps) {
  if (exit_warp_clears(ring)) return;
  const uint32_t threads = blockDim.x - kOtherWarps * 32;
  if (!ring.broken) {
    const uint32_t stride = grid_size() * threads, part = (ring.dirty / (stride * steps) + 1) * stride;
    const uint32_t first = cta_index() * threads + threadIdx.x + step * part;
    clear(p, ring, first, min(first + part, ring.dirty), stride);
  }
  if (step + 1 == steps) ptx::barrier_arrive(kCleared, threads + 32);
}

// Whether the call is poisoned, for the warps with rows: known once the entry warp has compared all signatures. look() asks without
// waiting, ahead of the arithmetic; is_poisoned() waits if that was too early.
class StatusReader {
 public:
  __device__ __forceinline__ explicit StatusReader(const CallStatus& status)
      : here_(ptx::keep(ptx::shared_address(&status))) {}

  __device__ __forceinline__ void look() {
    if (protocol::kBare) return;
    is_known_ = ptx::mbarrier_test_cta(here_ + offsetof(CallStatus, mbarrier), 0);
    poisoned_ = ptx::load_shared(here_ + offsetof(CallStatus, poisoned));
  }

  __device__ __forceinline__ bool is_poisoned() {
    if (protocol::kBare) return false;
    if (!is_known_) {
      ptx::mbarrier_wait_cta(here_ + offsetof(CallStatus, mbarrier), 0);
      poisoned_ = ptx::load_shared(here_ + offsetof(CallStatus, poisoned));
      is_known_ = true;
    }
    return poisoned_ != 0;
  }

 private:
  const uint32_t here_;
  bool is_known_ = false;
  uint32_t poisoned_ = 0;
};

}  // namespace mnnvl_ar::kernels
