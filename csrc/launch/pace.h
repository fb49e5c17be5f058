// When one-shot sends its rows, and when it looks for those of its peers, in clocks of an SM. All for speed: every pace gives the
// same bits, and no rank needs to know another's (docs/log/2026-11-22-send-and-look.md).
//
//   * A look that finds nothing costs another whole latency of L2. So the first one is made when all that peers send at the same
//     time can be there.
//   * What an SM loads waits behind what it has stored to a peer, until that has left for the link. So a large call's rows leave
//     one after the other, as fast as the link takes them and no faster, and those that have come are summed meanwhile.
#pragma once

#include <cstdint>

#include "protocol/layout.h"
#include "protocol/params.h"

namespace mnnvl_ar::launch {

// What is known of a GPU's link; its figures are in mnnvl_ar/tuning/machines.json.
struct Link {
  uint32_t hop_clocks;             // from a store to the first look that finds it, of a small call
  uint32_t queued_hop_clocks;      // the same while the link is full
  uint32_t burst_bytes_per_clock;  // of a call that waits for all of its rows at once
  uint32_t paced_bytes_per_clock;  // of stores without end
  uint32_t paced_from_bytes;       // sent by a rank: from here on rows leave one after the other

  bool operator==(const Link&) const = default;
};

constexpr protocol::Pace pace_of(const protocol::Shape& shape, const Link& link) {
  if (shape.ranks == 1) return {0, 0};  // nobody to send to, or to wait for
  const uint64_t row_bytes = uint64_t{shape.vectors} * protocol::kVectorBytes * (shape.ranks - 1);
  const uint64_t bytes = row_bytes * shape.tokens;
  if (bytes < link.paced_from_bytes)
    return {0, link.hop_clocks + static_cast<uint32_t>(bytes / link.burst_bytes_per_clock)};
  return {static_cast<uint32_t>(row_bytes / link.paced_bytes_per_clock), link.queued_hop_clocks};
}

}  // namespace mnnvl_ar::launch
