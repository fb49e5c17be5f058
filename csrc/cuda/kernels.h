// The kernels that are built, by what a call is. One source file a dtype, so that they compile side by side.
#pragma once

#include "protocol/signature.h"

namespace mnnvl_ar::cuda {

// The kernel's address, for cudaLaunchKernelExC. World sizes 2, 4 and 8 have their own; any other has one in common.
// Two-shot takes `rows` at once: 1, 2 or 4.
const void* kernel(protocol::Strategy strategy, protocol::Op op, protocol::Dtype dtype, unsigned ranks, unsigned rows);

const void* bfloat16_kernel(protocol::Strategy strategy, protocol::Op op, unsigned ranks, unsigned rows);
const void* float16_kernel(protocol::Strategy strategy, protocol::Op op, unsigned ranks, unsigned rows);
const void* float32_kernel(protocol::Strategy strategy, protocol::Op op, unsigned ranks, unsigned rows);

}  // namespace mnnvl_ar::cuda
