// Filling a fault's record: who waited for whom, and what each peer last sent. The same on every transport.
#pragma once

#include <cstdint>

#include "protocol/call_params.h"
#include "protocol/portable.h"
#include "protocol/ring.h"

namespace mnnvl_ar::protocol {

// Of a call that cannot go on. peer: kMaxRanks if it is to be found out, as the first rank whose newest call is an earlier one.
struct Fault {
  uint32_t epoch;
  uint32_t peer;
  uint32_t peer_tokens;
  uint32_t peer_description;
  uint64_t began_ns;
};

// Everything but the code, which is to be written last. `sent(source, slot)` reads an epoch off the board.
template <class Record, class Sent>
MNNVL_AR_HD void fill_record(Record& record, const Params& p, Fault fault, uint64_t ended_ns, Sent sent) {
  for (uint32_t source = 0; source < p.ranks; ++source) {
    uint32_t newest = kNoEpoch;
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      const uint32_t epoch = sent(source, slot);
      if (epoch != kNoEpoch && (newest == kNoEpoch || epoch_distance(newest, epoch) > 0)) newest = epoch;
    }
    record.last_epoch[source] = newest;
    const bool is_behind = newest == kNoEpoch || epoch_distance(newest, fault.epoch) > 0;
    if (fault.peer >= p.ranks && source != p.rank && is_behind) fault.peer = source;
  }
  record.rank = p.rank;
  record.epoch = fault.epoch;
  record.tokens = p.tokens;
  record.description = p.description;
  record.peer = fault.peer;
  record.peer_tokens = fault.peer_tokens;
  record.peer_description = fault.peer_description;
  record.began_ns = fault.began_ns;
  record.ended_ns = ended_ns;
}

}  // namespace mnnvl_ar::protocol
