// Why a workspace broke, as seen from this rank: evidence from every rank's block, in numbers and in words. No torch.
//
// Contract
//   * Nothing here runs while all is well, but for look(), which reads own memory (16 KiB copied from a GPU).
//   * Safe beside a capture on another thread, and when peers are gone: their blocks stay mapped here.
//   * The first conclusive finding of a workspace is kept, since evidence fades: a stopped rank that goes on sends what it owed.
//   * A finding is left as a note in every peer's block, so that ranks which only find the mark of a peer can name the cause too.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "diagnosis/block_reader.h"
#include "diagnosis/notes.h"
#include "protocol/fault.h"

namespace mnnvl_ar::diagnosis {

// A call as a rank announced it, and of a large one a piece.
struct Sent {
  uint32_t epoch = protocol::kNoEpoch;
  uint32_t tokens = 0;  // of the whole call
  uint32_t description = 0;
  protocol::Numbers numbers{};  // of its norm, if it has one
  uint32_t number = 0;  // among the calls on the workspace, as people count them: pieces of one call have one number
};

struct Finding {
  FaultCode code = FaultCode::none;
  bool conclusive = false;
  bool relayed = false;                  // a peer found it, and marked our block
  uint32_t rank = 0;                     // this one
  uint32_t waiter = 0;                   // who waited for `peer`, or made the other call
  uint32_t peer = protocol::kMaxRanks;   // who did not come or called something else; kMaxRanks: not known
  uint32_t other = protocol::kMaxRanks;  // whose the other call is, where two differ and neither is known to be wrong
  Sent call;                             // the waiter's
  Sent peer_call;                        // that of `peer`, or of `other`
  uint64_t waited_ns = 0;
  int64_t when_ns = 0;              // Unix time of the fault, or of its discovery
  int64_t looked_ns = 0;            // monotonic time of the first look; 0: none
  uint64_t offset = 0;              // damaged: the first word
  Departure how = Departure::died;  // peer_died, peer_left
  std::vector<Sent> newest;         // of each rank
};

// Brings `finding`, which is not conclusive yet, up to date. Returns whether anything is wrong.
bool look(const Blocks& blocks, Finding& finding);
// The same where the blocks' memory has been given back: all there is to look at is the record of a captured call that ran since.
bool look_at_record(const Blocks& blocks, Finding& finding);
// Marks this rank's block broken, so that calls of this rank that wait end now.
void end_calls(const Blocks& blocks);
// How a look for a call that a lost peer owes something went.
enum class Loss : uint32_t {
  idle = 0,   // no call waits for that peer: 32 bytes have been read
  waits = 1,  // one may: another look is due soon
  done = 2,   // there is nothing more to do
};
// A peer is gone, and `next` is the epoch of the first call that it will not make, as far as it has said (kNoEpoch: it has not).
// Ends the call of this rank that has to wait for it: at once if the peer died, else if the same call waits at two looks in a row;
// `waiting` is for this function to remember, of each peer.
Loss lose(const Blocks& blocks, uint32_t peer, Departure how, uint32_t next, uint32_t& waiting);
// Of this rank's next call; kNoEpoch if its block cannot be read.
uint32_t next_epoch_of(const Blocks& blocks);
// What came of waiting for the device. capturing: a CUDA graph is being captured, so that nobody may wait.
enum class Quiet : uint32_t { yes, capturing, failed };
Quiet quiesce(const Blocks& blocks);

std::string name_of_call(const Sent& call);
std::string text_of(const Finding& finding);

}  // namespace mnnvl_ar::diagnosis
