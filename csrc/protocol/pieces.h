// A call in pieces. Rows are independent, so a call of more rows than a slot holds runs as several launches, each of as many
// rows as fit, with the same bits.
//
// Contract
//   * How a call is cut depends on the group, the slot, the strategy and the call's shape only: all ranks cut alike.
//   * Pieces are as few as can be, and as even as can be: all have `rows` rows but the last, which may have fewer.
//   * Each piece is a call to the ring: an epoch, a signature, a deadline of its own. What people read counts calls.
#pragma once

#include <cstdint>

#include "protocol/layout.h"
#include "protocol/portable.h"
#include "protocol/signature.h"

namespace mnnvl_ar::protocol {

struct Pieces {
  uint32_t rows;   // of every piece but the last; 0: not even one row fits
  uint32_t count;  // 0 for a call of no tokens

  MNNVL_AR_HD constexpr uint32_t first_of(uint32_t piece) const { return piece * rows; }
  MNNVL_AR_HD constexpr uint32_t rows_of(uint32_t piece, uint32_t tokens) const {
    return tokens - first_of(piece) < rows ? tokens - first_of(piece) : rows;
  }
};

MNNVL_AR_HD constexpr uint64_t slot_vectors_of(Strategy strategy, Shape shape) {
  return strategy == Strategy::one_shot ? one_shot_vectors(shape) : two_shot_vectors(shape);
}

// Rows of a launch, at most: its vectors fit the slot, and offsets into tensors of its size fit 32 bits; so do counts of the threads
// that go over them, of which the shortest row has a warp.
MNNVL_AR_HD constexpr uint32_t rows_that_fit(Strategy strategy, Shape call, uint64_t slot_vectors) {
  const uint64_t of_one = slot_vectors_of(strategy, {call.ranks, 1, call.vectors, call.own_too});
  const uint64_t by_offset = (kMaxSlotBytes / kVectorBytes - 1) / (call.vectors < 32 ? 32 : call.vectors);
  const uint64_t by_slot = of_one == 0 ? by_offset : slot_vectors / of_one;  // a rank alone is sent nothing
  return static_cast<uint32_t>(by_slot < by_offset ? by_slot : by_offset);
}

MNNVL_AR_HD constexpr Pieces pieces_of(Strategy strategy, Shape call, uint64_t slot_vectors) {
  const uint32_t most = rows_that_fit(strategy, call, slot_vectors);
  if (call.tokens <= most || most == 0) return {most == 0 ? 0 : call.tokens, call.tokens != 0};
  const uint32_t count = (call.tokens - 1) / most + 1;
  return {(call.tokens - 1) / count + 1, count};
}

}  // namespace mnnvl_ar::protocol
