#include "epilogues/rms_norm.h"

#include "kernels/build.cuh"

const void* mnnvl_ar::epilogues::rms_norm_kernel(protocol::Dtype dtype, uint32_t ranks, launch::Form form) {
  return kernels::kernel_of<RmsNorm>(dtype, ranks, form);
}
