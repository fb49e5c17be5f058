#include "cuda/kernels.cuh"

namespace mnnvl_ar::cuda {

const void* float32_kernel(protocol::Strategy strategy, protocol::Op op, unsigned ranks, unsigned at_once) {
  return kernel_of<protocol::Float32>(strategy, op, ranks, at_once);
}

}  // namespace mnnvl_ar::cuda
