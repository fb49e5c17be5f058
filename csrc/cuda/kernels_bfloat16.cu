#include "cuda/kernels.cuh"

namespace mnnvl_ar::cuda {

const void* bfloat16_kernel(protocol::Strategy strategy, protocol::Op op, unsigned ranks, unsigned at_once) {
  return kernel_of<protocol::Bfloat16>(strategy, op, ranks, at_once);
}

}  // namespace mnnvl_ar::cuda
