// The layout of one rank's block of symmetric memory: control words, then three slots.
//
// Contract
//   * Offsets are in bytes from the start of the block, the same on every rank.
//   * Inside a slot, positions are in 16-byte vectors, dense for the call at hand: a call dirties the first
//     `*_vectors(...)` vectors of its slot and nothing else.
//   * The functions that place data are the ones that size the slot: a call fits if and only if its count fits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "protocol/portable.h"
#include "protocol/ring.h"
#include "protocol/sentinel.h"

namespace mnnvl_ar::protocol {

inline constexpr uint32_t kMaxRanks = 72;               // one NVL72 domain
inline constexpr uint32_t kMaxRowVectors = 32768 / 16;  // rows of up to 32 KiB

// Replaced as a whole, once a call, by the last CTA of the call to have read it.
struct alignas(16) State {
  uint32_t epoch;     // of the call that reads it
  uint32_t launched;  // CTAs of all earlier calls, modulo 2^32
  uint32_t dirty;     // vectors that the previous call dirtied in its slot
  uint32_t arrived;   // CTAs of this call that have read the state: the sum of their arrival()
};

struct alignas(16) Progress {
  uint32_t finished;  // CTAs of all calls that will not read their slot again, modulo 2^32; equals `launched` at rest
  uint32_t broken;    // non-zero: a FaultCode, or peer_mark() of fault.h; the workspace computes nothing any more
  uint32_t claimed;   // non-zero: somebody fills the host's record
  uint32_t later;     // launches that were later pieces of their calls, modulo kEpochs: epochs less these are calls
};

inline constexpr uint32_t kCanary = 0x4d4e4152u;

inline constexpr uint64_t kStateOffset = 0;
inline constexpr uint64_t kProgressOffset = kStateOffset + sizeof(State);
inline constexpr uint64_t kBrokenOffset = kProgressOffset + offsetof(Progress, broken);
// Two boards of signatures, each [slot][source rank]: of calls, and behind it of the numbers of their norms.
inline constexpr uint64_t kBoardOffset = 1024;
inline constexpr uint64_t kOneBoardBytes = uint64_t{kSlots} * kMaxRanks * kVectorBytes,
                          kBoardBytes = 2 * kOneBoardBytes;
inline constexpr uint64_t kProbeOffset = 10240;  // bring-up's handshake
inline constexpr uint64_t kControlBytes = 16384;
static_assert(kBoardOffset + kBoardBytes <= kProbeOffset);
static_assert(kProbeOffset + kMaxRanks * kVectorBytes <= kControlBytes);

// So that kernels can do with 32-bit offsets inside a slot.
inline constexpr uint64_t kMaxSlotBytes = uint64_t{1} << 32;

MNNVL_AR_HD constexpr uint64_t slot_offset(uint32_t slot, uint64_t slot_bytes) {
  return kControlBytes + slot * slot_bytes;
}

MNNVL_AR_HD constexpr uint64_t block_bytes(uint64_t slot_bytes) { return slot_offset(kSlots, slot_bytes); }

MNNVL_AR_HD constexpr uint64_t board_offset(uint32_t slot, uint32_t source) {
  return kBoardOffset + (uint64_t{slot} * kMaxRanks + source) * kVectorBytes;
}

MNNVL_AR_HD constexpr uint64_t numbers_offset(uint32_t slot, uint32_t source) {
  return board_offset(slot, source) + kOneBoardBytes;
}

// A call's geometry: `vectors` 16-byte vectors a row.
struct Shape {
  uint32_t ranks;
  uint32_t tokens;
  uint32_t vectors;
  // One-shot: a rank's own rows come to it as well, as a multicast brings them. Slots are sized for that.
  bool own_too = true;
};

// One-shot: [source][token][vector]. The thread that sums a vector has its own rank's: it is sent to the others only, and what
// comes to a rank are their rows, in rank order.
MNNVL_AR_HD constexpr uint32_t source_of(Shape s, uint32_t rank, uint32_t receiver) {
  return rank - (!s.own_too && rank > receiver);
}

MNNVL_AR_HD constexpr uint64_t one_shot_vectors(Shape s) {
  return uint64_t{s.ranks - !s.own_too} * s.tokens * s.vectors;
}

MNNVL_AR_HD constexpr uint64_t one_shot_position(Shape s, uint32_t source, uint32_t token, uint32_t vector) {
  return (uint64_t{source} * s.tokens + token) * s.vectors + vector;
}

// Of so many vectors in a row, the most that divide them, for a tensor that has no rows of its own.
MNNVL_AR_HD constexpr uint32_t widest_row(uint64_t vectors) {
  uint32_t width = vectors == 0 || vectors > kMaxRowVectors ? kMaxRowVectors : static_cast<uint32_t>(vectors);
  while (vectors % width != 0) --width;
  return width;
}

// Two-shot: rank o owns columns [o * owned_columns, ...) of every row; the last owners may own fewer, or none.
MNNVL_AR_HD constexpr uint32_t owned_columns(Shape s) { return (s.vectors + s.ranks - 1) / s.ranks; }

MNNVL_AR_HD constexpr uint32_t columns_of(Shape s, uint32_t owner) {
  const uint32_t width = owned_columns(s), first = owner * width;
  return first >= s.vectors ? 0 : (s.vectors - first < width ? s.vectors - first : width);
}

// Stage 1, at the owner: [source rank][token][owned column]; the owner's own too, which other threads have.
MNNVL_AR_HD constexpr uint64_t scatter_vectors(Shape s) { return uint64_t{s.ranks} * s.tokens * owned_columns(s); }

MNNVL_AR_HD constexpr uint64_t scatter_position(Shape s, uint32_t source, uint32_t token, uint32_t column) {
  return (uint64_t{source} * s.tokens + token) * owned_columns(s) + column;
}

// Stage 2, at every rank, behind stage 1: [token][vector].
MNNVL_AR_HD constexpr uint64_t gather_position(Shape s, uint32_t token, uint32_t vector) {
  return scatter_vectors(s) + uint64_t{token} * s.vectors + vector;
}

MNNVL_AR_HD constexpr uint64_t two_shot_vectors(Shape s) { return scatter_vectors(s) + uint64_t{s.tokens} * s.vectors; }

}  // namespace mnnvl_ar::protocol
