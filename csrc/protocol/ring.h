// The ring: which slot a call writes and which it clears (rule R3 of docs/protocol.md).
//
// Contract
//   * Calls on a workspace are numbered by epochs 0, 1, ..., kEpochs - 1, 0, ... in the order in which they run. To the ring, each
//     piece of a large call (pieces.h) is a call.
//   * Call n writes slot_of(n) at every peer and clears slot_to_clear(n) of its own block, the slot of call n - 1.
//   * Any three successive epochs use three different slots, also across the wrap.
//   * CTAs of two calls, or of two epochs, that count themselves in together are noticed by one of them, but for coincidences
//     (arrival()).
#pragma once

#include <cstdint>

#include "protocol/portable.h"

namespace mnnvl_ar::protocol {

inline constexpr uint32_t kSlots = 3;

// 2^32 - 1, a multiple of kSlots: wrapping at 2^32 would use slot 0 twice in a row after some hours of service.
inline constexpr uint32_t kEpochs = 0xffffffffu;
static_assert(kEpochs % kSlots == 0);

// Never the epoch of a call: what a fresh signature board holds.
inline constexpr uint32_t kNoEpoch = 0xffffffffu;

MNNVL_AR_HD constexpr uint32_t next_epoch(uint32_t epoch) { return epoch + 1 == kEpochs ? 0 : epoch + 1; }

MNNVL_AR_HD constexpr uint32_t slot_of(uint32_t epoch) { return epoch % kSlots; }

MNNVL_AR_HD constexpr uint32_t slot_to_clear(uint32_t epoch) { return (epoch % kSlots + kSlots - 1) % kSlots; }

// Grids are smaller than this.
inline constexpr uint32_t kArrivalBits = 13, kMaxGrid = (1u << kArrivalBits) - 1;

// What each CTA of a call adds to State::arrived: one, and above it a mark of the call. `launch` differs between any two launches
// that could be under way at once. The factor is odd, so that neighbours' marks differ by an odd number.
MNNVL_AR_HD constexpr uint32_t arrival(uint32_t epoch, uint32_t launch) {
  return 1 + ((launch * 0x9e3779b1u + epoch) << kArrivalBits);
}

MNNVL_AR_HD constexpr uint32_t arrivals(uint32_t arrived) { return arrived & kMaxGrid; }

// Whether all that has been added is of the call whose CTAs add `mine`.
MNNVL_AR_HD constexpr bool is_one_call(uint32_t arrived, uint32_t mine) { return arrived == arrivals(arrived) * mine; }

// Calls from `from` to `to`, as a signed distance: positive when `to` is the later one.
MNNVL_AR_HD constexpr int32_t epoch_distance(uint32_t from, uint32_t to) {
  const uint32_t ahead = to >= from ? to - from : kEpochs - from + to;
  return ahead <= kEpochs / 2 ? static_cast<int32_t>(ahead) : -static_cast<int32_t>(kEpochs - ahead);
}

}  // namespace mnnvl_ar::protocol
