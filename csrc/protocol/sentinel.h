// The sentinel: the one bit pattern that means "not arrived" (rules R1 and R2 of docs/protocol.md).
//
// Contract
//   * A slot that holds no data holds kSentinel in every 32-bit word.
//   * Whatever is sent passes through sanitize(), so no word on the wire equals kSentinel.
//   * has_arrived() looks at every word, as an integer. There is no floating-point type in this file, on purpose: a compare
//     that flushes subnormals takes 0x80010000 for -0.0 and waits for ever.
#pragma once

#include <cstdint>

#include "protocol/portable.h"

namespace mnnvl_ar::protocol {

// One sentinel for every dtype, since calls of different dtypes share slots: -0.0f, or the 16-bit pair (+0, -0).
inline constexpr uint32_t kSentinel = 0x80000000u;

struct alignas(16) Vector {
  uint32_t word[4];
};
inline constexpr uint32_t kVectorBytes = 16;

// Turns the zero that equals the sentinel into a zero that does not. The sum starts from +0 (numerics.h), so the
// sign of a zero summand cannot be seen in the result.
MNNVL_AR_HD constexpr uint32_t sanitize(uint32_t word) { return word == kSentinel ? 0u : word; }

MNNVL_AR_HD constexpr Vector sanitize(Vector v) {
  return Vector{{sanitize(v.word[0]), sanitize(v.word[1]), sanitize(v.word[2]), sanitize(v.word[3])}};
}

MNNVL_AR_HD constexpr bool has_arrived(Vector v) {
  return v.word[0] != kSentinel && v.word[1] != kSentinel && v.word[2] != kSentinel && v.word[3] != kSentinel;
}

MNNVL_AR_HD constexpr Vector sentinel_vector() { return Vector{{kSentinel, kSentinel, kSentinel, kSentinel}}; }

}  // namespace mnnvl_ar::protocol
