// Quantised to 4 bits: what is stored of norm as e2m1 with an e4m3 scale for each block of 16 elements (NVFP4).
//
// Contract
//   * e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, round to nearest even; beyond 6, infinity too, +-6; the sign is kept, of zero too. It has no
//     NaN: a NaN is +6, and the scale of its block is NaN.
//   * The global scale is multiplied in: an element is about code * scale / global. `most` as in numerics_fp8.h.
//   * The same bits on every target, whose exhaustive test is on a GPU (tests/gpu/test_exhaustive.py). Only sm_100 and later have an
//     instruction for it, which is not used.
#pragma once

#include <cstdint>

#include "protocol/numerics_fp8.h"

namespace mnnvl_ar::protocol {

MNNVL_AR_HD constexpr uint32_t e2m1_of_bits(uint32_t bits) {
  const uint32_t sign = bits >> 28 & 8u, magnitude = magnitude_of(bits);
  if (is_nan(bits)) return 7;
  if (magnitude >= 0x40c00000u) return sign | 7;
  // From 1 on a code is the exponent, biased by 1, not 127, and one bit of the 23 behind it. Below, it counts halves.
  if (magnitude >= 0x3f800000u) return sign | round_off(magnitude - (126u << 23), 22);
  return sign | ((magnitude > 0x3e800000u) + (magnitude >= 0x3f400000u));
}

MNNVL_AR_HD uint32_t e2m1(float value) {
#if defined(__CUDA_ARCH__)
  // The same without a branch, since neighbours would take different ones. Of a sum with 1.5 * 2^23 units the lowest bits are the
  // number of units, rounded to nearest even; a unit is what codes are apart: 0.5 below 2, 1 below 4, and then 2.
  const uint32_t bits = as_bits(value), magnitude = magnitude_of(bits);
  const uint32_t most = magnitude < 0x40c00000u ? magnitude : 0x40c00000u;
  const bool from2 = most >= 0x40000000u, from4 = most >= 0x40800000u;
  const float units = from4 ? 0x1.8p24f : from2 ? 0x1.8p23f : 0x1.8p22f;
  const uint32_t code = (as_bits(add(as_float(most), units)) & 7u) + (from4 ? 4u : from2 ? 2u : 0u);
  return code | (is_nan(bits) ? 0u : bits >> 28 & 8u);
#else
  return e2m1_of_bits(as_bits(value));
#endif
}

// A vector's eight codes, the first in the lowest four bits.
template <class D>
MNNVL_AR_HD uint32_t e2m1_codes(const Vector& norm, Times scaled) {
  static_assert(D::kPerVector == 8);
  uint32_t codes = 0;
  MNNVL_AR_UNROLL
  for (int i = 0; i < 8; ++i) codes |= e2m1(scaled(D::load(norm, i))) << 4 * i;
  return codes;
}

// The scale of the tensor, with what all blocks need of it.
struct Nvfp4Global {
  float value, reciprocal;
};

MNNVL_AR_HD Nvfp4Global nvfp4_global(float scale) { return {scale, divide(1.0f, scale)}; }

struct Nvfp4Block {
  uint32_t scale;  // e4m3
  Times scaled;    // elements to codes
};

// A scale of 0 has codes of 0. Where scale / global has no reciprocal that is finite and not 0, as for NaN, or a global scale of
// infinity, codes could not say what is lost, so the scale is NaN.
MNNVL_AR_HD Nvfp4Block nvfp4_block(uint32_t most, Nvfp4Global global) {
  constexpr float kSixth = 0x1.555556p-3f;
  const uint32_t scale = e4m3(mul(global.value, mul(value_of_most(most), kSixth)));
  if ((scale & 0x7fu) == 0) return {scale, {0.0f}};
  const float factor = divide(1.0f, mul(e4m3_value(scale), global.reciprocal));
  const uint32_t magnitude = magnitude_of(as_bits(factor));
  if (magnitude == 0 || magnitude >= kInfinity) return {kE4m3Nan, {as_float(kPoison)}};
  return {scale, {factor}};
}

static_assert(e2m1_of_bits(0x3e800000u) == 0 && e2m1_of_bits(0x3e800001u) == 1 && e2m1_of_bits(0x3f400000u) == 2);
static_assert(e2m1_of_bits(0x40a00000u) == 6 && e2m1_of_bits(0x40a00001u) == 7 && e2m1_of_bits(0xffffffffu) == 7);
static_assert(e2m1_of_bits(0x80000000u) == 8 && e2m1_of_bits(0xff800000u) == 15);

}  // namespace mnnvl_ar::protocol
