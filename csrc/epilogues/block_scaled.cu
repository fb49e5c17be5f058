#include "epilogues/block_scaled.h"

#include "epilogues/list.h"
#include "kernels/build.cuh"

const void* mnnvl_ar::epilogues::block_scaled_kernel(protocol::Dtype dtype, uint32_t ranks, launch::Form form) {
  if (dtype == protocol::Dtype::bfloat16) return kernels::kernel_of<BlockScaled, protocol::Bfloat16>(ranks, form);
  if (dtype == protocol::Dtype::float16) return kernels::kernel_of<BlockScaled, protocol::Float16>(ranks, form);
  return nullptr;
}
