// One call, checked and on its way: the seam between the ops and the transports.
#pragma once

#include "torch/checks.h"
#include "torch/workspace.h"

namespace mnnvl_ar {

// What a call may choose; kAuto leaves it to the workspace.
struct Choice {
  int64_t strategy;
  int64_t pdl;
};

// Fills in the call's part of the workspace's parameters and runs it (host) or launches it on the current stream (CUDA).
// `params` holds the tensors' addresses and the epilogue's numbers. Zero tokens: nothing happens.
void run(int64_t handle, protocol::Op op, const Agreement& agreement, const Choice& choice,
         const protocol::Params& params);

}  // namespace mnnvl_ar
