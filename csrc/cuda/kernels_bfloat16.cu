#include "cuda/kernels.cuh"

namespace mnnvl_ar::cuda {

const void* bfloat16_kernel(protocol::Strategy strategy, protocol::Op op, unsigned ranks, unsigned rows) {
  return kernel_of<protocol::Bfloat16>(strategy, op, ranks, rows);
}

}  // namespace mnnvl_ar::cuda
