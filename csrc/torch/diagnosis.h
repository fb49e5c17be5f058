// Why a workspace broke, as seen from this rank: evidence from every rank's block, in numbers and in words.
//
// Contract
//   * Nothing here runs while all is well, but for poll(), which is a look at own memory (16 KiB copied from a GPU).
//   * Safe beside a capture on another thread, and when peers are gone: their blocks stay mapped here.
//   * The first conclusive finding of a workspace is kept, since evidence fades: a stopped rank that goes on sends what it owed.
//   * A finding is left as a note in every peer's block, so that those who were only told that something broke can name it too.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "protocol/call_params.h"

namespace mnnvl_ar {

struct Workspace;

inline constexpr uint32_t kDamaged = 5;  // beside FaultCode: control words were overwritten

// A call as a rank announced it.
struct Sent {
  uint32_t epoch = protocol::kNoEpoch;
  uint32_t tokens = 0;
  uint32_t description = 0;
};

struct Finding {
  uint32_t code = 0;  // FaultCode or kDamaged; 0: nothing is wrong
  bool conclusive = false;
  bool told = false;                    // a peer found it
  uint32_t rank = 0;                    // this one
  uint32_t waiter = 0;                  // who waited for `peer`, or made the other call
  uint32_t peer = protocol::kMaxRanks;  // who did not come or called something else; kMaxRanks: not known
  Sent call;                            // the waiter's
  Sent peer_call;
  uint64_t waited_ns = 0;
  int64_t when_ns = 0;       // Unix time of the fault, or of its discovery
  uint64_t offset = 0;       // kDamaged: the first word
  std::vector<Sent> newest;  // of each rank
};

// What is wrong with the workspace now. Takes workspace.reading.
Finding poll(Workspace& workspace);
// The same for a call that has just failed or is refused; waits some milliseconds for a peer's note if that may help.
Finding explain(Workspace& workspace);
// Marks this rank's block broken, so that calls of this rank that wait end now.
void end_calls(Workspace& workspace);
// Waits for the device. False: a capture is under way, or the device has failed.
bool quiesce(const Workspace& workspace);

std::string name_of_call(const Sent& call);
std::string text_of(const Finding& finding);

}  // namespace mnnvl_ar
