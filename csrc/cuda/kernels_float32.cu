#include "cuda/kernels.cuh"

namespace mnnvl_ar::cuda {

const void* float32_kernel(protocol::Strategy strategy, protocol::Op op, unsigned ranks) {
  return kernel_of<protocol::Float32>(strategy, op, ranks);
}

}  // namespace mnnvl_ar::cuda
