// What every call tells its peers about itself, so that a peer that called something else is named at once.
//
// Contract
//   * A signature is 16 bytes, written whole into board[slot_of(epoch)][source rank] of every peer.
//   * Each 8-byte half carries the epoch: a half that is there is recognised, a torn store is not taken for a signature.
#pragma once

#include <cstdint>

#include "protocol/portable.h"
#include "protocol/sentinel.h"

namespace mnnvl_ar::protocol {

enum class Dtype : uint32_t { bfloat16 = 0, float16 = 1, float32 = 2 };
enum class Strategy : uint32_t { one_shot = 0, two_shot = 1 };
enum class Op : uint32_t;  // its members, one an epilogue: epilogues/list.h

// A call in one word: op | dtype | strategy | vectors a row, four bits each but for the last.
MNNVL_AR_HD constexpr uint32_t describe(Op op, Dtype dtype, Strategy strategy, uint32_t vectors) {
  return static_cast<uint32_t>(op) | static_cast<uint32_t>(dtype) << 4 | static_cast<uint32_t>(strategy) << 8 |
         vectors << 12;
}

MNNVL_AR_HD constexpr Op op_of(uint32_t description) { return static_cast<Op>(description & 15); }
MNNVL_AR_HD constexpr Dtype dtype_of(uint32_t description) { return static_cast<Dtype>(description >> 4 & 15); }
MNNVL_AR_HD constexpr Strategy strategy_of(uint32_t description) {
  return static_cast<Strategy>(description >> 8 & 15);
}
MNNVL_AR_HD constexpr uint32_t vectors_of(uint32_t description) { return description >> 12; }

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
