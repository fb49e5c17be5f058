// The one answer, bit for bit: the order and the rounding of every floating-point step (docs/numerics.md).
//
// Contract
//   * Everything is IEEE binary32 (numerics_base.h). A product is rounded before it is added.
//   * Elements of a vector are in memory order. Ranks are added in rank order, to +0.
//   * What quantised outputs make of the norm is in numerics_fp8.h and numerics_fp4.h.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDA_ARCH__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "protocol/numerics_base.h"
#include "protocol/sentinel.h"

namespace mnnvl_ar::protocol {

// 1 / sqrt(q / H + eps), each step IEEE.
MNNVL_AR_HD float reciprocal_root(float square_sum, float hidden, float eps) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(square_sum, hidden), eps)));
#else
  return 1.0f / std::sqrt(square_sum / hidden + eps);
#endif
}

struct Bfloat16 {
  static constexpr int kPerVector = 8;
  static MNNVL_AR_HD float load(const Vector& v, int i) {
    const uint32_t word = v.word[i / 2];
    return as_float(i % 2 ? word & 0xffff0000u : word << 16);
  }
  static MNNVL_AR_HD uint32_t round(float value) {
    const uint32_t bits = as_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  }
  // Two floats to one word, the first in the low half.
  static MNNVL_AR_HD uint32_t round2(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return round(low) | round(high) << 16;
#endif
  }
};

struct Float16 {
  static constexpr int kPerVector = 8;
  static MNNVL_AR_HD float load_half(uint32_t half) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(half)));
    return value;
#else
    const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 0x1fu, mantissa = half & 0x3ffu;
    if (exponent == 0x1f) return as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // exact, zero included
    return as_float(sign | as_bits(magnitude));
#endif
  }
  static MNNVL_AR_HD float load(const Vector& v, int i) {
    const uint32_t word = v.word[i / 2];
    return load_half(i % 2 ? word >> 16 : word & 0xffffu);
  }
  static MNNVL_AR_HD uint32_t round(float value) {
    const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
    if (magnitude < 0x38800000u) {                        // below 2^-14: adding 0.5 rounds at 2^-24
      return sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u);
    }
    return sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  static MNNVL_AR_HD uint32_t round2(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return round(low) | round(high) << 16;
#endif
  }
};

struct Float32 {
  static constexpr int kPerVector = 4;
  static MNNVL_AR_HD float load(const Vector& v, int i) { return as_float(v.word[i]); }
};

template <class D>
MNNVL_AR_HD Vector pack(const float (&value)[D::kPerVector]) {
  if constexpr (D::kPerVector == 4) {
    return Vector{{as_bits(value[0]), as_bits(value[1]), as_bits(value[2]), as_bits(value[3])}};
  } else {
    return Vector{{D::round2(value[0], value[1]), D::round2(value[2], value[3]), D::round2(value[4], value[5]),
                   D::round2(value[6], value[7])}};
  }
}

// Step 1. Called once a rank, in rank order, on sums that start as +0; pack<D> of the result is s.
template <class D>
MNNVL_AR_HD void accumulate(float (&sum)[D::kPerVector], const Vector& x) {
  MNNVL_AR_UNROLL
  for (int i = 0; i < D::kPerVector; ++i) sum[i] = add(sum[i], D::load(x, i));
}

// Step 2.
template <class D>
MNNVL_AR_HD Vector add_residual(const Vector& s, const Vector& residual) {
  float z[D::kPerVector];
  MNNVL_AR_UNROLL
  for (int i = 0; i < D::kPerVector; ++i) z[i] = add(D::load(s, i), D::load(residual, i));
  return pack<D>(z);
}

// Step 3, within a vector; across vectors see reduce_group and total.
template <class D>
MNNVL_AR_HD float square_sum(const Vector& z) {
  float q = 0.0f;
  MNNVL_AR_UNROLL
  for (int i = 0; i < D::kPerVector; ++i) q = add(q, mul(D::load(z, i), D::load(z, i)));
  return q;
}

// Step 3, within a group of 32 neighbouring vectors: xor-butterfly 16, 8, 4, 2, 1. Every lane ends with the same bits, so
// the host computes one of them; the device does the same by shuffles.
inline constexpr int kGroup = 32;

inline float reduce_group(float (&lane)[kGroup]) {
  for (int step = kGroup / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lane[i] = lane[i] + lane[i + step];
  }
  return lane[0];
}

// Step 3, over the groups of a row: group i goes to sum i % 4, each in ascending order to +0. Four sums, so that a quarter of the
// additions are in line behind each other. Groups that are not there are +0, which changes no sum.
inline constexpr int kSums = 4;

MNNVL_AR_HD float total(const float (&sum)[kSums]) { return add(add(sum[0], sum[1]), add(sum[2], sum[3])); }

// Step 5. `weight` holds the kPerVector factors of this vector, as stored, in fp32.
template <class D>
MNNVL_AR_HD Vector normalize(const Vector& z, float rstd, const float (&weight)[D::kPerVector], float weight_bias) {
  float y[D::kPerVector];
  MNNVL_AR_UNROLL
  for (int i = 0; i < D::kPerVector; ++i) y[i] = mul(mul(D::load(z, i), rstd), add(weight_bias, weight[i]));
  return pack<D>(y);
}

}  // namespace mnnvl_ar::protocol
