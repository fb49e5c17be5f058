// IEEE binary32, an operation at a time, and its bits: what all numerics headers are made of.
//
// Contract
//   * Round to nearest even, subnormals kept, one rounding an operation.
//   * Host code must be compiled with -ffp-contract=off; device code uses the intrinsics that are never contracted.
#pragma once

#include <cstdint>

#if !defined(__CUDA_ARCH__)
#include <bit>
#endif

#include "protocol/portable.h"

namespace mnnvl_ar::protocol {

MNNVL_AR_HD float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

MNNVL_AR_HD float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

MNNVL_AR_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// a / b for b > 0, given 1 / b as division rounds it: on a GPU a product, and one correction by the remainder (Markstein).
//
// It has the bits of the division where the remainder is not subnormal: tried for every significand of a of 11 bits, as bf16 and fp16
// have, over every one of b, and for every a over 448 (tests/gpu/test_exhaustive.py). With a subnormal remainder the quotient is
// below 2^-12, for all a and b that occur, and e4m3 makes 0 of it either way.
MNNVL_AR_HD float divide_by(float a, float b, [[maybe_unused]] float reciprocal) {
#if defined(__CUDA_ARCH__)
  const float q = __fmul_rn(a, reciprocal), corrected = __fmaf_rn(__fmaf_rn(-q, b, a), reciprocal, q);
  return __uint_as_float((__float_as_uint(corrected) & 0x7fffffffu) | (__float_as_uint(a) & 0x80000000u));  // of 0, too
#else
  return a / b;
#endif
}

MNNVL_AR_HD float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

MNNVL_AR_HD uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return std::bit_cast<uint32_t>(value);
#endif
}

// Magnitudes of floats order as integers do, and every NaN is above infinity.
inline constexpr uint32_t kInfinity = 0x7f800000u;
MNNVL_AR_HD constexpr uint32_t magnitude_of(uint32_t bits) { return bits & 0x7fffffffu; }
MNNVL_AR_HD constexpr bool is_nan(uint32_t bits) { return magnitude_of(bits) > kInfinity; }

// A quiet NaN of any kind: tests compare NaN equal to NaN.
inline constexpr uint32_t kPoison = 0x7fffffffu;

}  // namespace mnnvl_ar::protocol
