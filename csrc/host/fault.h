// Waiting is bounded on the host transport too; the twin of csrc/cuda/fault.cuh.
#pragma once

#include <sched.h>
#include <time.h>

#include <cstddef>

#include "host/shared_word.h"
#include "protocol/call_params.h"
#include "protocol/ring.h"

namespace mnnvl_ar::host {

using protocol::FaultCode;
using protocol::Params;

inline uint64_t now_ns() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return uint64_t(t.tv_sec) * 1000000000u + uint64_t(t.tv_nsec);
}

inline uint32_t* broken_word(uint8_t* block) {
  return reinterpret_cast<uint32_t*>(block + protocol::kProgressOffset + offsetof(protocol::Progress, broken));
}

inline void report_fault(const Params& p, FaultCode code, uint32_t epoch, uint64_t began_ns, uint32_t peer,
                         uint32_t peer_tokens, uint32_t peer_description) {
  protocol::FaultRecord& record = *p.record;
  if (record.code != 0) return;
  for (uint32_t source = 0; source < p.ranks; ++source) {
    uint32_t newest = protocol::kNoEpoch;
    for (uint32_t slot = 0; slot < protocol::kSlots; ++slot) {
      const uint32_t sent = load_word(p.block + protocol::board_offset(slot, source));
      if (sent != protocol::kNoEpoch && (newest == protocol::kNoEpoch || protocol::epoch_distance(newest, sent) > 0)) {
        newest = sent;
      }
    }
    record.last_epoch[source] = newest;
    if (peer >= p.ranks && source != p.rank &&
        (newest == protocol::kNoEpoch || protocol::epoch_distance(newest, epoch) > 0)) {
      peer = source;
    }
  }
  record.rank = p.rank;
  record.epoch = epoch;
  record.tokens = p.tokens;
  record.description = p.description;
  record.peer = peer;
  record.peer_tokens = peer_tokens;
  record.peer_description = peer_description;
  record.began_ns = began_ns;
  record.ended_ns = now_ns();
  store_word(&record.code, static_cast<uint32_t>(code));
  store_word(broken_word(p.block), static_cast<uint32_t>(code));
  for (uint32_t i = 0; i + 1 < p.ranks; ++i) {
    store_word(broken_word(p.peers[i]), static_cast<uint32_t>(FaultCode::peer_fault));
  }
}

// One wait of one call: spins for a while, then gives the core away between looks.
class Patience {
 public:
  Patience(const Params& p, uint32_t epoch) : p_(p), epoch_(epoch) {}

  // After a look in vain. False: give up, the fault has been reported.
  bool once_more() {
    if (++looks_ < kSpins) return true;
    // The clock at every look: on a busy machine each yield may cost a time slice of every other process.
    const uint64_t now = now_ns();
    if (began_ns_ == 0) began_ns_ = now;
    if (load_word(broken_word(p_.block)) != 0) {
      report_fault(p_, FaultCode::peer_fault, epoch_, began_ns_, protocol::kMaxRanks, 0, 0);
      return false;
    }
    const bool bounded = p_.deadline_ns != 0 && !protocol::is_off(p_, protocol::Rule::deadline);
    if (bounded && now - began_ns_ >= p_.deadline_ns) {
      report_fault(p_, FaultCode::peer_timeout, epoch_, began_ns_, protocol::kMaxRanks, 0, 0);
      return false;
    }
    if (looks_ > kSpins * kSpins) {  // a long wait: a peer compiles, or is gone
      const timespec nap{0, 50000};
      nanosleep(&nap, nullptr);
    } else {
      sched_yield();
    }
    return true;
  }

 private:
  static constexpr uint32_t kSpins = 64;
  const Params& p_;
  uint32_t epoch_;
  uint32_t looks_ = 0;
  uint64_t began_ns_ = 0;
};

}  // namespace mnnvl_ar::host
