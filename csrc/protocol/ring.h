// The ring: which slot a call writes and which it clears (rule R3 of docs/protocol.md).
//
// Contract
//   * Calls on a workspace are numbered by epochs 0, 1, ..., kEpochs - 1, 0, ... in the order in which they run.
//   * Call n writes slot_of(n) at every peer and clears slot_to_clear(n) of its own block, the slot of call n - 1.
//   * Any three successive epochs use three different slots, also across the wrap.
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

// Calls from `from` to `to`, as a signed distance: positive when `to` is the later one.
MNNVL_AR_HD constexpr int32_t epoch_distance(uint32_t from, uint32_t to) {
  const uint32_t ahead = to >= from ? to - from : kEpochs - from + to;
  return ahead <= kEpochs / 2 ? static_cast<int32_t>(ahead) : -static_cast<int32_t>(kEpochs - ahead);
}

}  // namespace mnnvl_ar::protocol
