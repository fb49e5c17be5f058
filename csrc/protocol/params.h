// What a launch is given, on every transport: Params{tensors, launch, group}. Plain structs.
//
// Contract
//   * Nothing here says where a call stands in the ring: no epoch, no slot, no address inside a slot, no size to clear (rule R6).
//     A captured graph may replay these bytes for ever.
//   * What an epilogue is given besides is its own: CallOf<Epilogue> (epilogues/epilogue.h).
#pragma once

#include <cstdint>

#include "protocol/fault.h"
#include "protocol/portable.h"
#include "protocol/sabotage.h"
#include "protocol/signature.h"

namespace mnnvl_ar::protocol {

// x, and where the rows of this launch stand in their call: an op's call may be larger than one launch takes.
struct Tensors {
  const void* x;         // [tokens, vectors]: the first row of this launch
  uint32_t tokens;       // rows of this launch
  uint32_t vectors;      // 16-byte vectors a row
  uint32_t first_token;  // of this launch, in the call (pieces.h)
  uint32_t call_tokens;  // rows of the whole call
  uint32_t description;  // signature.h, describe()
  Numbers numbers;       // that are signed, of a call with a norm
};

// A group as one rank sees it: the same for all calls on a workspace.
struct Group {
  uint32_t rank;
  uint32_t ranks;
  uint64_t slot_bytes;
  const Orders* orders;
  uint8_t* block;  // own block
  FaultRecord* record;
  uint8_t* multicast;         // the group's blocks as one address, or null; our own block for tests (fanout.cuh)
  uint8_t* peers[kMaxRanks];  // blocks in rotated order: rank + 1, rank + 2, ..., rank

  // Any rank's block. In rotated order ranks do not all send to rank 0 first.
  MNNVL_AR_HD uint8_t* block_of(uint32_t other) const {
    const uint32_t ahead = other + ranks - rank - 1;
    return peers[ahead >= ranks ? ahead - ranks : ahead];
  }
};

// How rows are spread over CTAs: from a table's file, through the plan, to the kernel. 0 leaves a figure to the plan
// (launch/plan.h), in which none is 0.
struct LaunchShape {
  uint32_t cluster = 0;   // CTAs that hold a row together
  uint32_t max_ctas = 0;  // CTAs of the grid, at most; in a plan: exactly
  uint32_t batch = 0;     // two-shot: neighbouring rows that a cluster takes at once
  uint32_t lag = 0;       // two-shot: batches in flight between two stages

  bool operator==(const LaunchShape&) const = default;
};

// When one-shot sends its rows and looks for those of its peers, in clocks of an SM (launch/pace.h).
struct Pace {
  uint32_t row;         // from a row's sending to that of the next row; 0: all leave at once
  uint32_t first_look;  // from a row's sending to the first look for the same row of peers
};

enum class Pdl : uint32_t { off = 0, late = 1, early = 2 };

struct Launch {
  LaunchShape shape;  // as planned
  uint32_t clusters;  // of the grid
  uint32_t threads;   // of a CTA
  Pace pace;
  uint32_t number;  // which launch or captured call this is, to tell two at once apart (ring.h, arrival)
  uint32_t trigger_early;
  uint32_t programmatic;  // may begin before what came before it has ended; else nothing of that is left to wait for
};

// A GPU reads parameters through a small cache, line by line, as it needs them: what all threads read stands together, and `peers`,
// most of all bytes, comes last (another order cost a call 0.1 us).
struct Params {
  Tensors tensors;
  Launch launch;
  Group group;
#ifdef MNNVL_AR_TEST_BUILD
  Sabotage sabotage;
#endif
};

}  // namespace mnnvl_ar::protocol
