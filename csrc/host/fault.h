// Waiting is bounded on the host transport too; the counterpart of kernels/fault.cuh.
#pragma once

#include <sched.h>
#include <time.h>

#include <cstddef>

#include "host/interrupt.h"
#include "host/shared_word.h"
#include "protocol/fault.h"
#include "protocol/params.h"

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

inline void report_fault(const Params& p, FaultCode code, const protocol::Fault& fault) {
  const protocol::Group& g = p.group;
  protocol::FaultRecord& record = *g.record;
  if (record.code != FaultCode::none) return;
  protocol::fill_record(record, p, fault, now_ns(), [&g](uint32_t source, uint32_t slot) {
    return load_word(g.block + protocol::board_offset(slot, source));
  });
  store_word(&record.code, static_cast<uint32_t>(code));
  store_word_if_zero(broken_word(g.block), static_cast<uint32_t>(code));
  const uint32_t mark = protocol::peer_mark(g.rank, code);
  for (uint32_t i = 0; i + 1 < g.ranks && !protocol::is_heard_by_all(code); ++i) {
    uint32_t* word = broken_word(g.peers[i]);
    // The rank that found it may have marked that peer already, and knows more.
    code == FaultCode::peer_fault ? store_word_if_zero(word, mark) : store_word(word, mark);
  }
  if (code == FaultCode::ended) return;  // the host asked for it
  const volatile protocol::Orders& orders = *g.orders;
  const uint64_t began_ns = now_ns(), hold_ns = orders.hold_ns;
  while (orders.answered == 0 && now_ns() - began_ns < hold_ns) {
    const timespec nap{0, 100000};
    nanosleep(&nap, nullptr);
  }
}

// A marked block's call ends for what the host has marked it with, or since a peer has.
inline FaultCode code_of_own(uint32_t broken) {
  const auto code = static_cast<FaultCode>(broken);
  return protocol::is_heard_by_all(code) ? code : FaultCode::peer_fault;
}

// One wait of one call: spins for a while, then gives the core away between looks.
class BoundedWait {
 public:
  BoundedWait(const Params& p, uint32_t epoch) : p_(p), epoch_(epoch) {}

  // After a look in vain. False: give up, the fault has been reported.
  bool once_more() {
    if (++looks_ < kSpins) return true;
    // The clock at every look: on a busy machine each yield may cost a time slice of every other process.
    const uint64_t now = now_ns();
    if (began_ns_ == 0) began_ns_ = asked_ns_ = now;
    const uint32_t broken = load_word(broken_word(p_.group.block));
    if (broken == static_cast<uint32_t>(FaultCode::ended)) return end();
    if (broken != 0 && !protocol::is_off(p_, protocol::Rule::peer_mark)) {
      report_fault(p_, code_of_own(broken), {epoch_, protocol::kMaxRanks, 0, 0, began_ns_});
      return false;
    }
    if (now - asked_ns_ >= kAskNs) {
      asked_ns_ = now;
      if (interrupted()) return end();
    }
    const uint64_t deadline_ns = static_cast<const volatile protocol::Orders*>(p_.group.orders)->deadline_ns;
    const bool is_bounded = deadline_ns != 0 && !protocol::is_off(p_, protocol::Rule::deadline);
    if (is_bounded && now - began_ns_ >= deadline_ns) {
      report_fault(p_, FaultCode::peer_timeout, {epoch_, protocol::kMaxRanks, 0, 0, began_ns_});
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
  static constexpr uint64_t kAskNs = 100000000;  // between two questions for signals, which take Python's lock

  bool end() {
    report_fault(p_, FaultCode::ended, {epoch_, p_.group.rank, 0, 0, began_ns_});
    return false;
  }

  const Params& p_;
  uint32_t epoch_;
  uint32_t looks_ = 0;
  uint64_t began_ns_ = 0;
  uint64_t asked_ns_ = 0;
};

}  // namespace mnnvl_ar::host
