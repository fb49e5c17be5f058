#include "epilogues/per_token_fp8.h"

#include "kernels/build.cuh"

const void* mnnvl_ar::epilogues::per_token_fp8_kernel(protocol::Dtype dtype, uint32_t ranks, launch::Form form) {
  if (dtype == protocol::Dtype::bfloat16) return kernels::kernel_of<PerTokenFp8, protocol::Bfloat16>(ranks, form);
  if (dtype == protocol::Dtype::float16) return kernels::kernel_of<PerTokenFp8, protocol::Float16>(ranks, form);
  return nullptr;
}
