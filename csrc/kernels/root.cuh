// 1 / sqrt(q / H + eps) (numerics step 4): the bits of protocol::reciprocal_root in a third of its time.
//
// IEEE division and root are the same few corrections of an approximation, behind checks of the operands' range, one after
// the other. Here one check stands for all, 1 / H is there before the row is, and one approximation serves both the root and its
// reciprocal. q / H: a quotient within an ulp, corrected by its exact remainder times the rounded 1 / H, is the rounded one
// (Markstein). The root and its reciprocal (protocol/numerics_root.h) depend on nothing but their argument and the approximation;
// every argument is tried, as is every q of many H: tests/gpu/test_exhaustive.py.
#pragma once

#include "kernels/ptx.cuh"
#include "protocol/numerics.h"
#include "protocol/numerics_root.h"

namespace mnnvl_ar::kernels {

class ReciprocalRoot {
 public:
  __device__ __forceinline__ explicit ReciprocalRoot(float hidden)
      : hidden_(hidden), over_hidden_(reciprocal(hidden)) {}

  __device__ __forceinline__ float operator()(float square_sum, float eps) const {
    float mean = __fmul_rn(square_sum, over_hidden_);
    mean = correct(mean, square_sum);
    mean = protocol::add(correct(mean, square_sum), eps);

    const float about = ptx::reciprocal_root_approximate(mean);
    const float root = protocol::root_by(mean, about);
    const float rstd = protocol::reciprocal_by(root, about);

    using protocol::is_moderate;
    if (is_moderate(square_sum) && is_moderate(mean) && !protocol::is_all_ones(root)) return rstd;
    return protocol::reciprocal_root(square_sum, hidden_, eps);
  }

 private:
  static __device__ __forceinline__ float reciprocal(float value) { return __frcp_rn(value); }

  __device__ __forceinline__ float correct(float quotient, float square_sum) const {
    return __fmaf_rn(__fmaf_rn(-hidden_, quotient, square_sum), over_hidden_, quotient);
  }

  const float hidden_, over_hidden_;
};

}  // namespace mnnvl_ar::kernels
