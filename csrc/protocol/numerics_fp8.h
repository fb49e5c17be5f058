// Quantised to 8 bits: what is stored of norm as e4m3 (OCP FP8 E4M3FN), and the scales that go with it, fp32 or e8m0.
//
// Contract
//   * Conversions are integer code on the bits of an fp32, or an instruction that gives the same bits: the same on the host, on every
//     GPU, and at compile time.
//   * e4m3: round to nearest even; beyond 448, infinity too, +-448; the sign is kept, of zero too; every NaN is 0x7f.
//   * e8m0: the exponent, biased by 127, of the least power of two that is no smaller; the sign is not looked at; 0xff is NaN.
//   * `most` is the largest magnitude of norm in what shares a scale, as bits: `largest` of each vector, and the integer maximum of
//     those. A NaN is above all, so it makes the scale NaN, and with it every element: a NaN never becomes a number.
//   * Elements are multiplied or divided as written here; docs/numerics.md says it in words.
#pragma once

#include <cstdint>

#include "protocol/numerics_base.h"
#include "protocol/sentinel.h"

namespace mnnvl_ar::protocol {

// ---- conversions

// The upper bits of `value` without its last `shift`, 1 to 30, rounded to nearest even.
MNNVL_AR_HD constexpr uint32_t round_off(uint32_t value, uint32_t shift) {
  return (value + (1u << (shift - 1)) - 1 + (value >> shift & 1u)) >> shift;
}

inline constexpr uint32_t kE4m3Nan = 0x7f, kE4m3Most = 0x7e;

MNNVL_AR_HD constexpr uint32_t e4m3_of_bits(uint32_t bits) {
  const uint32_t sign = bits >> 24 & 0x80u, magnitude = magnitude_of(bits);
  if (is_nan(bits)) return kE4m3Nan;
  if (magnitude >= 0x43e00000u) return sign | kE4m3Most;
  // From 2^-6 on a code is the exponent, biased by 7, not 127, and 3 bits of the 23 behind it.
  if (magnitude >= 0x3c800000u) return sign | round_off(magnitude - (120u << 23), 20);
  // Below, it counts steps of 2^-9. A significand of exponent 116 or less is less than half a step: 25 bits take it to 0.
  const uint32_t exponent = magnitude >> 23, significand = (magnitude & 0x7fffffu) | 0x800000u;
  return sign | round_off(significand, exponent > 116 ? 141 - exponent : 25);
}

MNNVL_AR_HD uint32_t e4m3(float value) { return e4m3_of_bits(as_bits(value)); }

// Four of them in a word, the first in the lowest byte. The instruction gives the same bits, NaN included, for every word
// (tests/gpu/test_exhaustive.py), in a twentieth of the instructions.
MNNVL_AR_HD uint32_t e4m3x4(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t codes;
  asm("{ .reg .b16 low, high;"
      " cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;"
      " cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;"
      " mov.b32 %0, {low, high}; }"
      : "=r"(codes)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return codes;
#else
  return e4m3(a) | e4m3(b) << 8 | e4m3(c) << 16 | e4m3(d) << 24;
#endif
}

MNNVL_AR_HD float e4m3_value(uint32_t code) {
  const uint32_t sign = (code & 0x80u) << 24, exponent = code >> 3 & 0xfu, mantissa = code & 7u;
  if ((code & 0x7fu) == kE4m3Nan) return as_float(kPoison);
  if (exponent != 0) return as_float(sign | (exponent + 120) << 23 | mantissa << 20);
  return as_float(sign | as_bits(static_cast<float>(mantissa) * 0x1p-9f));  // exact, zero included
}

inline constexpr uint32_t kE8m0Nan = 0xff, kE8m0Most = 0xfe;

MNNVL_AR_HD constexpr uint32_t e8m0_up_of_bits(uint32_t bits) {
  const uint32_t magnitude = magnitude_of(bits);
  if (is_nan(bits)) return kE8m0Nan;
  if (magnitude <= 0x00400000u) return 0;  // 2^-127 is the least of e8m0, and subnormal in fp32
  const uint32_t up = (magnitude + 0x7fffffu) >> 23;
  return up < kE8m0Most ? up : kE8m0Most;
}

MNNVL_AR_HD uint32_t e8m0_up(float value) { return e8m0_up_of_bits(as_bits(value)); }

// ---- of a vector

// Of each half, as an unsigned integer.
MNNVL_AR_HD uint32_t larger_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __vmaxu2(a, b);
#else
  const uint32_t low = (a & 0xffffu) > (b & 0xffffu) ? a : b, high = a >> 16 > b >> 16 ? a : b;
  return (low & 0xffffu) | (high & 0xffff0000u);
#endif
}

template <class D>
MNNVL_AR_HD uint32_t largest(const Vector& norm) {
  static_assert(D::kPerVector == 8);  // magnitudes of halves order like integers, too
  uint32_t pair = 0;
  MNNVL_AR_UNROLL
  for (int i = 0; i < 4; ++i) pair = larger_halves(pair, norm.word[i] & 0x7fff7fffu);
  const uint32_t low = pair & 0xffffu, high = pair >> 16;
  return as_bits(D::load(Vector{{low > high ? low : high, 0, 0, 0}}, 0));
}

// How an element is brought to a code's range.
struct Times {
  float factor;
  MNNVL_AR_HD float operator()(float x) const { return mul(x, factor); }
};
struct Over {
  float divisor, reciprocal;

  MNNVL_AR_HD explicit Over(float scale) : divisor(scale), reciprocal(divide(1.0f, scale)) {
#if defined(__CUDA_ARCH__)
    // Over infinity a remainder would be NaN: the product is all. Of the exponent, or nvcc compares floating-point numbers.
    if (as_bits(scale) >> 23 == 255) divisor = 0.0f;
#endif
  }
  MNNVL_AR_HD float operator()(float x) const { return divide_by(x, divisor, reciprocal); }
};

// A vector's codes, in memory order. Rows of 16 bits alone are quantised.
struct Codes8 {
  uint32_t word[2];
};

template <class D, class Scaled>
MNNVL_AR_HD Codes8 e4m3_codes(const Vector& norm, Scaled scaled) {
  static_assert(D::kPerVector == 8);
  float x[8];
  MNNVL_AR_UNROLL
  for (int i = 0; i < 8; ++i) x[i] = scaled(D::load(norm, i));
  return {{e4m3x4(x[0], x[1], x[2], x[3]), e4m3x4(x[4], x[5], x[6], x[7])}};
}

// ---- scales

inline constexpr float kE4m3Range = 448.0f;
// As bits: magnitudes are compared as integers, since kernels have no floating-point compare (rule R1).
inline constexpr uint32_t kLeastTokenScale = 0x36924925u;  // 1 / (448 * 512)
inline constexpr uint32_t kLeastGroup =
    0x2edbe6ffu;  // 1e-10, of a group's `most`, and of a scale that is a power of two

// Of what is neither negative nor subnormal, or is less than any scale may be, over 448.
MNNVL_AR_HD float over_range(float x) {
  constexpr float kOver448 = 0x1.24924ap-9f;
  return as_bits(x) >= kInfinity ? x : divide_by(x, kE4m3Range, kOver448);
}

// The largest magnitude as a number, but no less than `least`; of all NaNs, one.
MNNVL_AR_HD float value_of_most(uint32_t most, uint32_t least = 0) {
  if (is_nan(most)) return as_float(kPoison);
  return as_float(most < least ? least : most);
}

// Static, one scale a tensor, by which codes are multiplied to get elements back: the factor of elements.
MNNVL_AR_HD Times static_fp8(float scale) { return {divide(1.0f, scale)}; }

// Per token. Codes are multiplied by it to get elements back; elements are divided by it.
MNNVL_AR_HD float token_scale(uint32_t most) {
  return value_of_most(as_bits(over_range(value_of_most(most))), kLeastTokenScale);
}

// Per group of 128, as fp32. Likewise.
MNNVL_AR_HD float group_scale(uint32_t most) { return over_range(value_of_most(most, kLeastGroup)); }

// The same, up to a power of two, as its byte of e8m0: here infinity is 0xff as NaN is, since the exponent of fp32 is.
MNNVL_AR_HD uint32_t group_scale_e8m0(uint32_t most) {
  if (is_nan(most)) return kE8m0Nan;
  return (as_bits(value_of_most(as_bits(group_scale(most)), kLeastGroup)) + 0x7fffffu) >> 23;
}

// That power of two as fp32, of which infinity and NaN are two.
MNNVL_AR_HD float group_scale_power(uint32_t most) {
  return as_float(is_nan(most) ? kPoison : group_scale_e8m0(most) << 23);
}

// What division by it is, with the same bits: by infinity a product with 0.
MNNVL_AR_HD Times group_power_factor(uint32_t most) {
  if (is_nan(most)) return {as_float(kPoison)};
  const uint32_t scale = group_scale_e8m0(most);
  return {scale == kE8m0Nan ? 0.0f : as_float((254 - scale) << 23)};
}

// MXFP8, per block of 32: its scale, and the factor of elements, 0 where the scale is at an end of its range.
MNNVL_AR_HD uint32_t mxfp8_scale(uint32_t most) {
  constexpr float kOver448 = 0x1.24924ap-9f;  // a product, by the definition
  return e8m0_up(mul(value_of_most(most), kOver448));
}

MNNVL_AR_HD Times mxfp8_factor(uint32_t scale) {
  if (scale == kE8m0Nan) return {as_float(kPoison)};
  return {scale == 0 ? 0.0f : as_float((254 - scale) << 23)};  // of 254, an exponent of 0: 0
}

// ---- at compile time, what these headers promise on every target

static_assert(e4m3_of_bits(0x43e80000u) == 0x7e && e4m3_of_bits(0xff800000u) == 0xfe &&
              e4m3_of_bits(0xffc00001u) == 0x7f);
static_assert(e4m3_of_bits(0x80000000u) == 0x80 && e4m3_of_bits(0x3a800000u) == 0 && e4m3_of_bits(0x3a800001u) == 1);
static_assert(e8m0_up_of_bits(0x3f800000u) == 127 && e8m0_up_of_bits(0x3f800001u) == 128);
static_assert(e8m0_up_of_bits(kInfinity) == kE8m0Most && e8m0_up_of_bits(0x00400001u) == 1);

}  // namespace mnnvl_ar::protocol
