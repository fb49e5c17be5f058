// Faults: their numbers, the record that a failed call leaves for the host, and the mark that tells peers. The same on every
// transport.
//
// Contract
//   * The first thread of a rank to find a fault fills the record, its code last, and only then marks blocks as broken: whoever
//     sees the mark that this rank set finds the record.
//   * It ends its call only when the host has answered or `hold_ns` have passed: nothing that is computed behind the call leaves the
//     process before the host knows.
//   * `broken` of a rank's own block holds a FaultCode. In a peer's block it holds peer_mark(): who found what.
#pragma once

#include <cstdint>

#include "protocol/layout.h"
#include "protocol/portable.h"
#include "protocol/ring.h"
#include "protocol/signature.h"

namespace mnnvl_ar::protocol {

// The numbers of mnnvl_ar/diagnosis.py, too.
enum class FaultCode : uint32_t {
  none = 0,
  peer_timeout = 1,   // a peer's data did not come within the deadline
  call_mismatch = 2,  // a peer called with another op, shape, dtype or strategy
  peer_fault = 3,     // a peer found one of these and marked our block
  overlap = 4,        // the previous call on this rank never finished
  damaged = 5,        // control words were overwritten; found by the host's diagnosis only
  launch_shape = 6,   // the call was launched in another shape than it was planned in
  two_at_once = 7,    // two calls on this rank took the same place in the ring
  ended = 8,          // this rank ended its call itself: a signal, close(force), recover; host transport only
  peer_died = 9,      // a peer's process is no more; this and the next are the host's, who hears of it
  peer_left = 10,     // a peer has left in good order, and this rank's call is one that it will not make
  asleep = 11,        // a captured call was replayed while its workspace slept, or after close(force=True)
};

// Every rank hears of the first two for itself, and of the third, this rank's own, before: who ends a call for them tells no peer. (A
// kernel that is ended so marks its peers all the same, as one that was told of a fault.)
MNNVL_AR_HD constexpr bool is_heard_by_all(FaultCode code) {
  return code == FaultCode::peer_died || code == FaultCode::peer_left || code == FaultCode::asleep;
}

MNNVL_AR_HD constexpr uint32_t peer_mark(uint32_t rank, FaultCode code) {
  return static_cast<uint32_t>(FaultCode::peer_fault) | static_cast<uint32_t>(code) << 8 | rank << 16;
}
MNNVL_AR_HD constexpr FaultCode code_of_mark(uint32_t broken) { return static_cast<FaultCode>(broken >> 8 & 0xff); }
MNNVL_AR_HD constexpr uint32_t author_of_mark(uint32_t broken) { return broken >> 16; }

// What the host orders while calls run, captured ones too: in memory that the host writes and the device maps. Read during long waits
// and after a fault only, so it costs a call nothing.
struct Orders {
  uint64_t deadline_ns;  // that a call waits for its peers; 0: for ever
  uint64_t hold_ns;   // that the call which found a fault waits for `answered` before it ends, and its stream goes on
  uint32_t answered;  // non-zero: the host has heard of the fault
};

// Written once, into memory that the host reads and the device maps.
struct FaultRecord {
  FaultCode code;  // written last
  uint32_t rank;
  uint32_t epoch;
  uint32_t tokens;       // of the whole call
  uint32_t description;  // signature.h, describe()
  Numbers numbers;
  uint32_t peer;  // the peer that differs, or the first one that is missing
  uint32_t peer_tokens;
  uint32_t peer_description;
  Numbers peer_numbers;
  uint64_t began_ns;  // %globaltimer, or CLOCK_MONOTONIC on the host transport
  uint64_t ended_ns;
  uint32_t last_epoch[kMaxRanks];  // of each peer's newest signature here, or kNoEpoch
};

// What the finder knows. peer: kMaxRanks if it is to be found out, as the first rank whose newest call is an earlier one.
struct Fault {
  uint32_t epoch;
  uint32_t peer;
  uint32_t peer_tokens;
  uint32_t peer_description;
  uint64_t began_ns;
  Numbers peer_numbers{};
};

// Everything but the code. `signed_epoch(source, slot)` reads the epoch of a signature in this rank's board.
template <class Record, class Params, class SignedEpoch>
MNNVL_AR_HD void fill_record(Record& record, const Params& p, Fault fault, uint64_t ended_ns,
                             SignedEpoch signed_epoch) {
  for (uint32_t source = 0; source < p.group.ranks; ++source) {
    uint32_t newest = kNoEpoch;
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      const uint32_t epoch = signed_epoch(source, slot);
      if (epoch != kNoEpoch && (newest == kNoEpoch || epoch_distance(newest, epoch) > 0)) newest = epoch;
    }
    record.last_epoch[source] = newest;
    const bool is_behind = newest == kNoEpoch || epoch_distance(newest, fault.epoch) > 0;
    if (fault.peer >= p.group.ranks && source != p.group.rank && is_behind) fault.peer = source;
  }
  record.rank = p.group.rank;
  record.epoch = fault.epoch;
  record.tokens = p.tensors.call_tokens;
  record.description = p.tensors.description;
  record.numbers.eps = p.tensors.numbers.eps;  // one by one: a volatile record cannot take a struct
  record.numbers.weight_bias = p.tensors.numbers.weight_bias;
  record.peer = fault.peer;
  record.peer_tokens = fault.peer_tokens;
  record.peer_description = fault.peer_description;
  record.peer_numbers.eps = fault.peer_numbers.eps;
  record.peer_numbers.weight_bias = fault.peer_numbers.weight_bias;
  record.began_ns = fault.began_ns;
  record.ended_ns = ended_ns;
}

}  // namespace mnnvl_ar::protocol
