#include "cuda/kernels.cuh"

namespace mnnvl_ar::cuda {

const void* float32_kernel(protocol::Strategy strategy, protocol::Op op, unsigned ranks, unsigned rows) {
  return kernel_of<protocol::Float32>(strategy, op, ranks, rows);
}

}  // namespace mnnvl_ar::cuda
