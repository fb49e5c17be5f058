// Negative controls: in a test build each rule can be broken on purpose, to show that a named test then fails. In any other
// build every question is answered `false` at compile time and nothing of this is left.
#pragma once

#include <cstdint>

#include "protocol/portable.h"

namespace mnnvl_ar::protocol {

// A bare build has none of what ends a wait or notices a mistake: it is timed beside the real one (tools/safety_cost.py), to show
// what that costs, and is good for nothing else.
#ifdef MNNVL_AR_BARE
inline constexpr bool kBare = true;
#else
inline constexpr bool kBare = false;
#endif

enum class Rule : uint32_t {
  device_epoch = 0,     // off: the epoch is the host's, frozen at capture
  device_dirty = 1,     // off: what to clear is the host's, frozen at capture
  three_slots = 2,      // off: two
  clear = 3,            // off: nothing is cleared
  sanitize = 4,         // off: the sentinel may be sent
  integer_compare = 5,  // off: FlashInfer's old compare, x == 0 and signbit, flushing subnormals
  every_word = 6,       // off: only the first word of a vector is checked
  quiescence = 7,       // off: a predecessor that still runs is not waited for
  advance_last = 8,     // off: the first CTA to have read the state advances it
  deadline = 9,         // off: waits are not bounded
  signature = 10,       // off: a peer's signature is not compared
  two_at_once = 11,     // off: CTAs of two calls that count themselves in together are not noticed
  peer_mark = 12,       // off: a workspace that a peer has marked broken goes on
  canary = 13,          // off: overwritten control words are not noticed
  zero_tokens = 14,     // off: a call of no tokens takes its place in the ring like any other
  one_thread = 15,      // off: two threads may be in calls of one workspace
  still_open = 16,      // off: a call that has begun does not look again whether the workspace was closed meanwhile
  all_pieces = 17,      // off: a call ends behind its first piece
  float_mode = 18,      // off: the caller's floating-point mode holds in a call on the host
  padding = 19,         // off: what pads an output is not stored
};

// Carried by each launch of a test build.
struct Sabotage {
  uint32_t broken;        // bit i: Rule i is off
  uint32_t frozen_epoch;  // for device_epoch
  uint32_t frozen_dirty;  // for device_dirty
  uint32_t delay_seed;    // non-zero: CTAs sleep at random between steps
  uint32_t delay_ns;      // at most this long
};

constexpr uint32_t rule_bit(Rule rule) { return 1u << static_cast<uint32_t>(rule); }

template <class Call>
MNNVL_AR_HD constexpr bool is_off([[maybe_unused]] const Call& call, [[maybe_unused]] Rule rule) {
#ifdef MNNVL_AR_TEST_BUILD
  return (call.sabotage.broken & (1u << static_cast<uint32_t>(rule))) != 0;
#elif defined(MNNVL_AR_BARE)
  return rule == Rule::deadline || rule == Rule::signature || rule == Rule::two_at_once || rule == Rule::peer_mark;
#else
  return false;
#endif
}

}  // namespace mnnvl_ar::protocol
