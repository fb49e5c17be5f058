// When one-shot sends its rows, and when it looks for those of its peers, in clocks of an SM. All for speed: every pace gives the
// same bits, and no rank needs to know another's (docs/performance.md, "When to send, and when to look").
//
//   * A look that finds nothing costs another whole latency of L2. So the first one is made when all that peers send at the same
//     time can be there.
//   * What an SM loads waits behind what it has stored to a peer, until that has left for the link. So a large call's rows leave
//     one after the other, as fast as the link takes them and no faster, and those that have come are summed meanwhile.
#pragma once

#include <cstdint>

#include "protocol/layout.h"

namespace mnnvl_ar::cuda {

struct Pace {
  uint32_t row;         // from a row's sending to that of the next row; 0: all leave at once
  uint32_t first_look;  // from a row's sending to the first look for the same row of peers
};

// What is known of a link, from looks and paces raced on two H200s.
struct Link {
  uint32_t hop;          // clocks from a store to the first look that finds it, of a small call
  uint32_t queued_hop;   // the same while the link is full
  uint32_t burst_bytes;  // a clock, of a call that waits for all of its rows at once
  uint32_t paced_bytes;  // a clock, of stores without end
};

inline constexpr Link kHopper{900, 1800, 195, 183};     // of H200, 1.98 GHz: 386 and 362 GB/s, of 450
inline constexpr Link kBlackwell{900, 1800, 390, 366};  // twice the bytes, by the datasheet: not measured

inline constexpr uint64_t kPacedBytes = 200 << 10;  // sent by a rank: from here on rows leave one after the other

constexpr Pace pace_of(const protocol::Shape& shape, const Link& link) {
  const uint64_t row_bytes = uint64_t{shape.vectors} * protocol::kVectorBytes * (shape.ranks - 1);
  const uint64_t bytes = row_bytes * shape.tokens;
  if (bytes < kPacedBytes) return {0, link.hop + static_cast<uint32_t>(bytes / link.burst_bytes)};
  return {static_cast<uint32_t>(row_bytes / link.paced_bytes), link.queued_hop};
}

}  // namespace mnnvl_ar::cuda
