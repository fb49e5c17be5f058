#include "epilogues/plain.h"

#include "kernels/build.cuh"

const void* mnnvl_ar::epilogues::plain_kernel(protocol::Dtype dtype, uint32_t ranks, launch::Form form) {
  return kernels::kernel_of<Plain>(dtype, ranks, form);
}
