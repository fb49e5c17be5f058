// The kernels that are built, by what a call is. One source file a dtype, so that they compile side by side.
#pragma once

#include "protocol/signature.h"

namespace mnnvl_ar::cuda {

// The kernel's address, for cudaLaunchKernelExC. World sizes 2, 4 and 8 have their own; any other has one in common.
// at_once, of two-shot: 1, 2 or 4 rows. Of one-shot: 1 column a thread, or of two ranks 2, of its cluster's only row; 0: one row
// after the other, 3: the same by two columns, of two ranks.
const void* kernel(protocol::Strategy strategy, protocol::Op op, protocol::Dtype dtype, unsigned ranks,
                   unsigned at_once);

const void* bfloat16_kernel(protocol::Strategy strategy, protocol::Op op, unsigned ranks, unsigned at_once);
const void* float16_kernel(protocol::Strategy strategy, protocol::Op op, unsigned ranks, unsigned at_once);
const void* float32_kernel(protocol::Strategy strategy, protocol::Op op, unsigned ranks, unsigned at_once);

}  // namespace mnnvl_ar::cuda
