// sqrt(x) and 1 / sqrt(x) by correcting an approximation of the latter, in fused multiply-adds: what kernels/root.cuh computes.
//
// Contract
//   * x is moderate. `about` is near 1 / sqrt(x): within 2^-22.9 of it, relatively, by PTX's word for rsqrt.approx.f32.
//   * root_by: the bits of sqrt(x), for the approximation that the GPU has. These are the four operations of nvcc's own inline
//     __fsqrt_rn. An error of 2^-22.9 would not be enough: two significands have approximations as near whose root is an ulp off.
//   * reciprocal_by: given the root's bits, those of 1 / root, for every `about` within 2^-21; but of roots that are all ones.
//   * Scaling x by 4^k scales all of it, exactly, so what holds on [1, 4) holds for all moderate x.
// Both are tried for every approximation on a CPU (tests/unit/test_root.py), and on GPUs for the one they have, for every x
// (tests/gpu/test_exhaustive.py).
#pragma once

#include <cmath>

#include "protocol/numerics_base.h"

namespace mnnvl_ar::protocol {

// a * b + c, rounded once.
MNNVL_AR_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

MNNVL_AR_HD float root_by(float x, float about) {
  const float root = mul(x, about);
  return fused(fused(-root, root, x), mul(0.5f, about), root);
}

MNNVL_AR_HD float reciprocal_by(float root, float about) {
  const float once = fused(about, fused(-root, about, 1.0f), about);
  return fused(once, fused(-root, once, 1.0f), once);
}

// 2^-80 to 2^80: nothing above overflows, nor loses bits below.
MNNVL_AR_HD bool is_moderate(float value) { return as_bits(value) - 0x17800000u < 0x50000000u; }

// The reciprocal of such a fraction lies so near a tie that the correction above decides it wrongly.
MNNVL_AR_HD bool is_all_ones(float value) { return (~as_bits(value) & 0x7fffffu) == 0; }

}  // namespace mnnvl_ar::protocol
