// Calls that are checked once and launched many times: what an op does before its launch is done by bind(), and kept.
//
// Contract
//   * While a thread binds a call, launches of that thread are kept in its BoundCall, in order, and not made.
//   * A bound call is launched by mnnvl_ar_run_bound(), which Python calls by ctypes: an op's way through PyTorch's dispatcher costs more
//     than all that is left to do. It looks at what may have changed, as each call does: a broken, closed or sleeping
//     workspace, another thread in a call on it, other workspaces that share the device, other processors to count on.
//   * What it is given is memory of others: whoever binds a call keeps its tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "protocol/params.h"

namespace mnnvl_ar {

struct BoundLaunch {
  void* function;               // a CUfunction
  std::vector<std::byte> call;  // a CallOf the epilogue
  size_t params_at;             // where its Params stand

  protocol::Params& params() { return *reinterpret_cast<protocol::Params*>(call.data() + params_at); }
};

struct BoundCall {
  int64_t workspace = 0;
  int64_t device = -1;
  uint32_t sharing = 0;     // workspaces of the device that plans were made for
  uint32_t processors = 0;  // and what calls counted on then: `wake` and `recover` agree on it anew
  std::vector<BoundLaunch> launches;
};

// Of this thread, or null.
BoundCall* binding();

}  // namespace mnnvl_ar
