// What every call tells its peers about itself, so that a peer that called something else is named at once.
//
// Contract
//   * A signature is 16 bytes, written whole into board[slot_of(epoch)][source rank] of every peer.
//   * Each 8-byte half carries the epoch: a half that is there is recognised, a torn store is not taken for a signature.
//   * It is of the whole call, and of one of its pieces (pieces.h).
#pragma once

#include <cstdint>

#include "protocol/layout.h"
#include "protocol/portable.h"
#include "protocol/sentinel.h"

namespace mnnvl_ar::protocol {

enum class Dtype : uint32_t { bfloat16 = 0, float16 = 1, float32 = 2 };
enum class Strategy : uint32_t { one_shot = 0, two_shot = 1 };
enum class Op : uint32_t;  // its members, one an epilogue: epilogues/list.h

// A piece's number is given modulo this.
inline constexpr uint32_t kSignedPieces = 1024;

// A call in one word: op, dtype, strategy, vectors a row, piece, in 6, 2, 2, 12 and 10 bits.
MNNVL_AR_HD constexpr uint32_t describe(Op op, Dtype dtype, Strategy strategy, uint32_t vectors, uint32_t piece) {
  return static_cast<uint32_t>(op) | static_cast<uint32_t>(dtype) << 6 | static_cast<uint32_t>(strategy) << 8 |
         vectors << 10 | piece % kSignedPieces << 22;
}
static_assert(kMaxRowVectors < 1 << 12);

MNNVL_AR_HD constexpr Op op_of(uint32_t description) { return static_cast<Op>(description & 63); }
MNNVL_AR_HD constexpr Dtype dtype_of(uint32_t description) { return static_cast<Dtype>(description >> 6 & 3); }
MNNVL_AR_HD constexpr Strategy strategy_of(uint32_t description) { return static_cast<Strategy>(description >> 8 & 3); }
MNNVL_AR_HD constexpr uint32_t vectors_of(uint32_t description) { return description >> 10 & 4095; }
MNNVL_AR_HD constexpr uint32_t piece_of(uint32_t description) { return description >> 22; }

// `tokens`: of the whole call.
MNNVL_AR_HD constexpr Vector signature(uint32_t epoch, uint32_t tokens, uint32_t description) {
  return Vector{{epoch, tokens, epoch, description}};
}

MNNVL_AR_HD constexpr bool is_signature_of(Vector v, uint32_t epoch) {
  return v.word[0] == epoch && v.word[2] == epoch;
}

MNNVL_AR_HD constexpr bool agrees(Vector v, uint32_t tokens, uint32_t description) {
  return v.word[1] == tokens && v.word[3] == description;
}

}  // namespace mnnvl_ar::protocol
