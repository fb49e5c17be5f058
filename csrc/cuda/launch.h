// Launching: which kernel, in which shape. Raw pointers and streams, no torch.
//
// Contract
//   * plan() depends on the geometry and the device only, and remembers: a call costs one look-up once its shape has been seen.
//   * The grid is never larger than what the device holds at once, so all CTAs of a call are co-resident (rule R5); with several
//     workspaces on the device, never larger than its share of that, so that they may run side by side on several streams.
//   * Launches go through the driver, which costs the CPU less than the runtime. It is found at run time, never linked.
//   * load_kernels() must have run on the device before any launch under capture.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/pace.h"
#include "protocol/call_params.h"

namespace mnnvl_ar::cuda {

struct Plan {
  CUfunction function;
  uint32_t cluster;   // CTAs that hold a row together
  uint32_t clusters;  // of the grid
  uint32_t threads;   // of a CTA
  uint32_t batch;     // two-shot
  uint32_t lag;
  Pace pace;  // one-shot
};

// What the caller may fix; 0 leaves it to plan().
struct Tuning {
  uint32_t cluster;
  uint32_t max_ctas;
  uint32_t batch;
  uint32_t lag;
  uint32_t sharers;  // workspaces that may run at once on the device, this one included

  bool operator==(const Tuning&) const = default;
};

cudaError_t load_kernels(unsigned ranks);

cudaError_t plan(protocol::Strategy strategy, protocol::Op op, protocol::Dtype dtype, protocol::Shape shape,
                 const Tuning& tuning, int device, Plan* result);

CUresult launch(const Plan& plan, protocol::Pdl pdl, protocol::Params& params, CUstream stream);

}  // namespace mnnvl_ar::cuda
