// Which CUDA graphs hold a workspace's addresses: those that captured a call, and what was instantiated of them, until all of that is
// destroyed and has run.
#pragma once

#include <cuda_runtime_api.h>

#include "torch/workspace.h"

namespace mnnvl_ar {

// Before a launch on `stream`, by the thread that is in the call: if the stream captures, workspace.graphs counts the graph.
void note_capture(Workspace& workspace, cudaStream_t stream);

}  // namespace mnnvl_ar
