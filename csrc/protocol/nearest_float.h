// A double as the nearest float, ties to even, whatever the thread's rounding mode is, and with subnormals: by integers. Arguments of
// calls come as doubles, and are signed, and computed with, as floats: they must be alike on ranks whose threads are in other modes.
#pragma once

#include <bit>
#include <cstdint>

namespace mnnvl_ar::protocol {

constexpr float nearest_float(double value) {
  constexpr int kFraction = 52, kDropped = 52 - 23;
  const auto bits = std::bit_cast<uint64_t>(value);
  const auto sign = static_cast<uint32_t>(bits >> 63) << 31;
  const uint64_t fraction = bits & ((uint64_t{1} << kFraction) - 1);
  const auto biased = static_cast<int>(bits >> kFraction & 0x7ff);
  const auto with_sign = [sign](uint64_t magnitude) {
    return std::bit_cast<float>(sign | static_cast<uint32_t>(magnitude));
  };
  if (biased == 0x7ff) return with_sign(fraction != 0 ? 0x7fc00000 | fraction >> kDropped : 0x7f800000);
  int exponent = biased - 1023 + 127, dropped = kDropped;
  if (exponent >= 0xff) return with_sign(0x7f800000);
  if (exponent <= 0) dropped += 1 - exponent, exponent = 1;  // subnormal
  if (dropped > kFraction + 1) return with_sign(0);          // less than half of the least, as is any subnormal double
  const uint64_t significand = fraction | uint64_t{1} << kFraction;
  const uint64_t rest = significand & ((uint64_t{1} << dropped) - 1), half = uint64_t{1} << (dropped - 1);
  uint64_t kept = significand >> dropped;
  if (rest > half || (rest == half && kept % 2 == 1)) ++kept;
  // The leading bit counts into the exponent, and so does a carry: to infinity, too.
  return with_sign((static_cast<uint64_t>(exponent - 1) << 23) + kept);
}

static_assert(nearest_float(0.1) == 0.1f && nearest_float(-1e-6) == -1e-6f && nearest_float(1e-45) == 1e-45f);
static_assert(nearest_float(3.5e38) > 3.4e38f && nearest_float(0x1p-150) == 0.0f &&
              nearest_float(0x1.8p-150) == 0x1p-149f);

}  // namespace mnnvl_ar::protocol
