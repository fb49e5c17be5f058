#include "cuda/kernels.cuh"

namespace mnnvl_ar::cuda {

const void* float16_kernel(protocol::Strategy strategy, protocol::Op op, unsigned ranks, unsigned rows) {
  return kernel_of<protocol::Float16>(strategy, op, ranks, rows);
}

}  // namespace mnnvl_ar::cuda
