// What every call tells its peers about itself, so that a peer that called something else is named at once.
//
// Contract
//   * A signature is 16 bytes, written as two words of 64 bits into board[slot_of(epoch)][source rank] of every peer. A call with a
//     norm has a second one, for the numbers of the norm, in a board of its own (layout.h).
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

// A call in one word, from the lowest bit up. Vectors of a row, of which there is one at least, are given less one. The same library
// runs on all ranks, so this may change.
inline constexpr uint32_t kOpBits = 4, kDtypeBits = 2, kStrategyBits = 1, kVectorsBits = 11, kVariantBits = 6,
                          kTagBits = 2, kPieceBits = 6;
inline constexpr uint32_t kDtypeAt = kOpBits, kStrategyAt = kDtypeAt + kDtypeBits,
                          kVectorsAt = kStrategyAt + kStrategyBits, kVariantAt = kVectorsAt + kVectorsBits,
                          kTagAt = kVariantAt + kVariantBits, kPieceAt = kTagAt + kTagBits;
static_assert(kPieceAt + kPieceBits == 32 && kMaxRowVectors <= 1 << kVectorsBits);

inline constexpr uint32_t kTags = 1 << kTagBits;
// A piece's number is given modulo this.
inline constexpr uint32_t kSignedPieces = 1 << kPieceBits;

// How an op is called, in a signature's few bits. What its epilogue stores besides is the epilogue's (epilogues/epilogue.h).
inline constexpr uint32_t kWeightIsFp32 = 1, kNormToo = 2, kScaleOrderAt = 2, kScaleOrderBits = 2,
                          kScaleKindAt = kScaleOrderAt + kScaleOrderBits, kScaleKindBits = 2;
static_assert(kScaleKindAt + kScaleKindBits == kVariantBits);

// tag: the caller's, to tell calls apart that are alike in all else. piece: of the call.
MNNVL_AR_HD constexpr uint32_t describe(Op op, Dtype dtype, Strategy strategy, uint32_t vectors, uint32_t tag,
                                        uint32_t piece, uint32_t variant = 0) {
  return static_cast<uint32_t>(op) | static_cast<uint32_t>(dtype) << kDtypeAt |
         static_cast<uint32_t>(strategy) << kStrategyAt | (vectors - 1) << kVectorsAt | variant << kVariantAt |
         tag << kTagAt | piece % kSignedPieces << kPieceAt;
}

MNNVL_AR_HD constexpr uint32_t bits_of(uint32_t description, uint32_t at, uint32_t bits) {
  return description >> at & ((1u << bits) - 1);
}
MNNVL_AR_HD constexpr Op op_of(uint32_t d) { return static_cast<Op>(bits_of(d, 0, kOpBits)); }
MNNVL_AR_HD constexpr Dtype dtype_of(uint32_t d) { return static_cast<Dtype>(bits_of(d, kDtypeAt, kDtypeBits)); }
MNNVL_AR_HD constexpr Strategy strategy_of(uint32_t d) {
  return static_cast<Strategy>(bits_of(d, kStrategyAt, kStrategyBits));
}
MNNVL_AR_HD constexpr uint32_t vectors_of(uint32_t d) { return bits_of(d, kVectorsAt, kVectorsBits) + 1; }
MNNVL_AR_HD constexpr uint32_t variant_of(uint32_t d) { return bits_of(d, kVariantAt, kVariantBits); }
MNNVL_AR_HD constexpr uint32_t tag_of(uint32_t d) { return bits_of(d, kTagAt, kTagBits); }
MNNVL_AR_HD constexpr uint32_t piece_of(uint32_t d) { return bits_of(d, kPieceAt, kPieceBits); }

// The numbers of a norm, as bits.
struct Numbers {
  uint32_t eps;
  uint32_t weight_bias;

  bool operator==(const Numbers&) const = default;
};

// `first` and `second`: tokens of the whole call and description, or the numbers of its norm.
MNNVL_AR_HD constexpr Vector signature(uint32_t epoch, uint32_t first, uint32_t second) {
  return Vector{{epoch, first, epoch, second}};
}

MNNVL_AR_HD constexpr bool is_signature_of(Vector v, uint32_t epoch) {
  return v.word[0] == epoch && v.word[2] == epoch;
}

MNNVL_AR_HD constexpr bool agrees(Vector v, uint32_t first, uint32_t second) {
  return v.word[1] == first && v.word[3] == second;
}

// What a look at a peer's signatures finds.
enum class Signed : uint32_t { not_yet, alike, differs };

// `call` and `numbers`: as they stand in the boards; `numbers` counts where the call has a norm.
template <bool kNormed>
MNNVL_AR_HD constexpr Signed compare(uint32_t epoch, Vector call, Vector numbers, uint32_t call_tokens,
                                     uint32_t description, Numbers mine) {
  if (!is_signature_of(call, epoch)) return Signed::not_yet;
  const bool are_there = kNormed && is_signature_of(numbers, epoch);
  if (!agrees(call, call_tokens, description)) return Signed::differs;
  if (are_there && !agrees(numbers, mine.eps, mine.weight_bias)) return Signed::differs;
  return are_there || !kNormed ? Signed::alike : Signed::not_yet;
}

// Those of a peer, for the report. Where they are not there yet nothing is known to differ, and ours stand for them.
template <bool kNormed>
MNNVL_AR_HD constexpr Numbers numbers_of(Vector numbers, uint32_t epoch, Numbers mine) {
  return kNormed && is_signature_of(numbers, epoch) ? Numbers{numbers.word[1], numbers.word[3]} : mine;
}

}  // namespace mnnvl_ar::protocol
