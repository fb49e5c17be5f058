// csrc/protocol's conversions to e4m3, e2m1 and e8m0 against those of NVIDIA's own headers, on the host, and controls: conversions
// that are wrong in one way each, which the same words have to tell from right ones. Prints JSON.
//
//   nvidia_codes decisive    words that decide all: every upper half, with lower halves 0, 1, 7fff, 8000, 8001, ffff. Between two
//                            words of one upper half a step function whose steps have 7 mantissa bits at most does not step.
//   nvidia_codes all         all 2^32, without the controls
#include <cuda_fp4.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <thread>
#include <vector>

#include "protocol/numerics_fp4.h"
#include "protocol/numerics_fp8.h"

namespace {

using namespace mnnvl_ar::protocol;

uint32_t nvidia_e4m3(uint32_t bits) { return __nv_cvt_float_to_fp8(as_float(bits), __NV_SATFINITE, __NV_E4M3); }
uint32_t nvidia_e2m1(uint32_t bits) { return __nv_cvt_float_to_fp4(as_float(bits), __NV_E2M1, cudaRoundNearest); }
uint32_t nvidia_e8m0(uint32_t bits) { return __nv_cvt_float_to_e8m0(as_float(bits), __NV_SATFINITE, cudaRoundPosInf); }

// Ties away from zero: a tie is what the word below it rounds otherwise.
uint32_t ties_away_e4m3(uint32_t bits) { return e4m3_of_bits(is_nan(bits + 1) ? bits : bits + 1); }
uint32_t ties_away_e2m1(uint32_t bits) { return e2m1_of_bits(is_nan(bits + 1) ? bits : bits + 1); }
// As PyTorch's cast: beyond the tie above 448 there is NaN.
uint32_t unsaturated_e4m3(uint32_t bits) { return magnitude_of(bits) > 0x43e80000u ? kE4m3Nan : e4m3_of_bits(bits); }
// Always one up, powers of two included.
uint32_t strictly_up_e8m0(uint32_t bits) { return e8m0_up_of_bits(is_nan(bits + 1) ? bits : bits + 1); }

struct Compared {
  const char* name;
  uint32_t (*ours)(uint32_t);
  uint32_t (*theirs)(uint32_t);
};
constexpr Compared kCompared[] = {
    {"e4m3", e4m3_of_bits, nvidia_e4m3},
    {"e2m1", e2m1_of_bits, nvidia_e2m1},
    {"e8m0", e8m0_up_of_bits, nvidia_e8m0},
    {"ties away e4m3", ties_away_e4m3, nvidia_e4m3},
    {"ties away e2m1", ties_away_e2m1, nvidia_e2m1},
    {"unsaturated e4m3", unsaturated_e4m3, nvidia_e4m3},
    {"strictly up e8m0", strictly_up_e8m0, nvidia_e8m0},
};
constexpr int kKinds = std::size(kCompared), kRight = 3;  // the others are controls

struct Counts {
  uint64_t words = 0, differ = 0;
  uint32_t first = 0;
};
using All = std::array<Counts, kKinds>;

void compare(uint32_t bits, int kinds, All& counts) {
  for (int i = 0; i < kinds; ++i) {
    Counts& count = counts[i];
    count.words += 1;
    if (kCompared[i].ours(bits) == kCompared[i].theirs(bits)) continue;
    if (count.differ++ == 0) count.first = bits;
  }
}

All compare_upper_halves(uint32_t first, uint32_t last, bool all) {
  All counts{};
  for (uint32_t upper = first; upper < last; ++upper) {
    if (all) {
      for (uint32_t lower = 0; lower < 0x10000; ++lower) compare(upper << 16 | lower, kRight, counts);
    } else {
      for (uint32_t lower : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) compare(upper << 16 | lower, kKinds, counts);
    }
  }
  return counts;
}

}  // namespace

int main(int argc, char** argv) {
  const bool all = argc == 2 && std::strcmp(argv[1], "all") == 0;
  if (!all && (argc != 2 || std::strcmp(argv[1], "decisive") != 0)) return 2;
  const uint32_t parts = std::max(1u, std::thread::hardware_concurrency());
  std::vector<All> found(parts);
  std::vector<std::thread> threads;
  for (uint32_t part = 0; part < parts; ++part) {
    threads.emplace_back([&, part] {
      found[part] = compare_upper_halves(0x10000ull * part / parts, 0x10000ull * (part + 1) / parts, all);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < (all ? kRight : kKinds); ++i) {
    Counts total;
    for (const All& counts : found) {
      if (total.differ == 0) total.first = counts[i].first;
      total.words += counts[i].words, total.differ += counts[i].differ;
    }
    std::printf("%s\"%s\": {\"words\": %llu, \"differ\": %llu, \"first\": %u}", i ? ", " : "{", kCompared[i].name,
                static_cast<unsigned long long>(total.words), static_cast<unsigned long long>(total.differ),
                total.first);
  }
  int values = 0;
  for (uint32_t code = 0; code < 256; ++code) {
    const float theirs = __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
    const float ours = e4m3_value(code);
    values += ours == theirs ? std::signbit(ours) != std::signbit(theirs) : !(ours != ours && theirs != theirs);
  }
  std::printf(", \"values of e4m3\": {\"words\": 256, \"differ\": %d, \"first\": 0}}\n", values);
}
