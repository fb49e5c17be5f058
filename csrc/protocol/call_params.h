// What a call is given, on every transport, and what it leaves behind when it cannot go on. Plain structs.
//
// Nothing here says where a call stands: no epoch, no slot, no address inside a slot, no size to clear (rule R6). A captured
// graph may replay these bytes for ever.
#pragma once

#include <cstdint>

#include "protocol/layout.h"
#include "protocol/sabotage.h"
#include "protocol/signature.h"

namespace mnnvl_ar::protocol {

enum class Pdl : uint32_t { off = 0, late = 1, early = 2 };

// Written once, by the first thread to find a fault, into memory that the host reads (and a device maps).
struct FaultRecord {
  uint32_t code;  // FaultCode; written last
  uint32_t rank;
  uint32_t epoch;
  uint32_t tokens;
  uint32_t description;  // describe
  uint32_t peer;         // the peer that differs, or the first one that is missing
  uint32_t peer_tokens;
  uint32_t peer_description;
  uint64_t began_ns;  // %globaltimer, or CLOCK_MONOTONIC on the host transport
  uint64_t ended_ns;
  uint32_t last_epoch[kMaxRanks];  // of each peer's newest signature here, or kNoEpoch
};

enum class FaultCode : uint32_t {
  none = 0,
  peer_timeout = 1,   // a peer's data did not come within the deadline
  call_mismatch = 2,  // a peer called with another op, shape, dtype or strategy
  peer_fault = 3,     // a peer found one of these and told us
  overlap = 4,        // the previous call on this rank never finished
  launch_shape = 6,  // the call was launched in another shape than it was planned in (5 is the host's own, diagnosis.h)
  two_at_once = 7,   // two calls on this rank took the same place in the ring
};

// What is written into the `broken` word of peers: that it is not theirs, whose it is, and what that rank found.
MNNVL_AR_HD constexpr uint32_t told(uint32_t rank, uint32_t code) {
  return static_cast<uint32_t>(FaultCode::peer_fault) | code << 8 | rank << 16;
}
MNNVL_AR_HD constexpr uint32_t told_code(uint32_t broken) { return broken >> 8 & 0xff; }
MNNVL_AR_HD constexpr uint32_t told_by(uint32_t broken) { return broken >> 16; }

struct Params {
  const void* x;
  const void* residual;
  const void* weight;
  void* out;
  void* residual_out;
  float eps;
  float weight_bias;
  uint32_t weight_is_fp32;

  uint32_t tokens;
  uint32_t vectors;  // 16-byte vectors a row
  uint32_t rank;
  uint32_t ranks;
  uint32_t description;
  uint32_t batch;              // two-shot: rows a cluster takes at once
  uint32_t lag;                // two-shot: batches in flight between two stages, at least 1
  uint32_t row_clocks;         // one-shot: its pace (cuda/pace.h)
  uint32_t first_look_clocks;  // one-shot
  uint32_t cluster;            // the launch as it was planned: CTAs of a cluster,
  uint32_t clusters;           // clusters of the grid,
  uint32_t threads;            // threads of a CTA
  uint32_t launch;             // which launch or captured call this is, to tell two at once apart (ring.h, arrival)
  uint32_t trigger_early;
  uint64_t slot_bytes;
  uint64_t deadline_ns;  // 0: none
  uint8_t* block;        // own block
  FaultRecord* record;
  uint8_t* multicast;         // the group's blocks as one address, or null
  uint8_t* peers[kMaxRanks];  // blocks in rotated order: rank + 1, rank + 2, ..., rank

#ifdef MNNVL_AR_TEST_BUILD
  Sabotage sabotage;
#endif
};

}  // namespace mnnvl_ar::protocol
