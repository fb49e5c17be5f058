// For tests/unit/test_sass.py: the quick root by itself, and the root that nvcc puts in its place, to compare their machine code.
#include "kernels/ptx.cuh"
#include "protocol/numerics_root.h"

extern "C" __global__ void quick_root(float* p) {
  const float x = *p, about = mnnvl_ar::ptx::reciprocal_root_approximate(x);
  const float root = mnnvl_ar::protocol::root_by(x, about);
  p[0] = root;
  p[1] = mnnvl_ar::protocol::reciprocal_by(root, about);
}

extern "C" __global__ void nvcc_root(float* p) { *p = __fsqrt_rn(*p); }
