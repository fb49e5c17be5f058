// Planning and launching: which form of a kernel, over how many CTAs. Raw pointers and streams, no torch.
//
// Contract
//   * plan() depends on the request only, and remembers: a call costs one look-up once its like has been seen.
//   * The grid is never larger than what the device, or as much of it as the call may count on, holds at once, so all CTAs of a call
//     are co-resident (rule R5); with several workspaces on the device, never larger than its share of that, so that they may run
//     side by side on several streams.
//   * Launches go through the driver, which costs the CPU less than the runtime. It is found at run time, never linked.
//   * load_kernels() must have run on the device before any launch under capture.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "epilogues/list.h"
#include "launch/pace.h"

namespace mnnvl_ar::launch {

// All that a plan depends on.
struct Request {
  protocol::Op op;
  protocol::Dtype dtype;
  protocol::Strategy strategy;
  uint32_t ranks, tokens, vectors;
  protocol::LaunchShape shape;
  uint32_t sharers;     // workspaces that may run at once on the device, this one included
  uint32_t processors;  // that the call may count on (processors.h); 0: all of the device
  int device;
  Link link;

  bool operator==(const Request&) const = default;
};

struct Plan {
  CUfunction function;
  protocol::Launch launch;  // but for what differs between calls: number and trigger_early
};

// Every kernel that may be launched for so many ranks on the current device.
cudaError_t load_kernels(uint32_t ranks);

cudaError_t plan(const Request& request, Plan* result);

// `call`: a CallOf the plan's epilogue, with `launch` in it. `device`: the current one.
CUresult launch(CUfunction function, const protocol::Launch& launch, int device, void* call, CUstream stream);

}  // namespace mnnvl_ar::launch
