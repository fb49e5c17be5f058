// What the host transport computes, as text, to be compared between machines and compilers: bits are the interface.
//
//   host_numerics
//
// A line a result: what it is, how many words, their digest. First conversions, scales and the root, over the words
// that decide conversions (tests/unit/test_codes.py); then each epilogue in each dtype, by three threads as ranks. All
// NaN of fp32 count as one: their bits are the machine's.
//
// Each call is made by both strategies, and again in a floating-point mode that flushes subnormals and rounds down,
// which may not show. In a test build the rule that guards against that is off: the control.
//
// Exit: 0; 2 ranks, strategies or modes differ; 3 a fault (a deadline of a minute).
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "epilogues/block_scaled.h"
#include "epilogues/per_token_fp8.h"
#include "epilogues/plain.h"
#include "epilogues/rms_norm.h"
#include "epilogues/static_fp8.h"
#include "host/one_rank.h"
#include "host_blocks.h"

using namespace mnnvl_ar;
using namespace mnnvl_ar::protocol;
using epilogues::BlockFormat;

namespace {

using Words = std::vector<uint32_t>;

void tell(const std::string& what, const Words& words) {
  uint64_t digest = 0xcbf29ce484222325ull;
  for (uint32_t word : words) digest = (digest ^ word) * 0x100000001b3ull;
  std::printf("%-40s %7zu words %016llx\n", what.c_str(), words.size(), static_cast<unsigned long long>(digest));
}

uint32_t one_nan(uint32_t bits) { return is_nan(bits) ? kPoison : bits; }
uint32_t one_nan(float value) { return one_nan(as_bits(value)); }

// ---- of one word

template <class Convert>
void tell_of_words(const char* what, Convert convert) {
  Words found;
  for (uint32_t upper = 0; upper < 0x10000; ++upper) {
    for (uint32_t lower : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) found.push_back(convert(upper << 16 | lower));
  }
  tell(what, found);
}

void tell_of_all_words() {
  const Nvfp4Global global = nvfp4_global(3.7f);
  tell_of_words("bf16", Bfloat16::round);
  tell_of_words("fp16", Float16::round);
  tell_of_words("value of fp16", [](uint32_t bits) { return one_nan(Float16::load_half(bits >> 16)); });
  tell_of_words("e4m3", e4m3_of_bits);
  tell_of_words("e2m1", e2m1_of_bits);
  tell_of_words("e8m0", e8m0_up_of_bits);
  tell_of_words("value of e4m3", [](uint32_t bits) { return one_nan(e4m3_value(bits >> 24)); });
  tell_of_words("token scale", [](uint32_t bits) { return one_nan(token_scale(magnitude_of(bits))); });
  tell_of_words("group scale", [](uint32_t bits) { return one_nan(group_scale(magnitude_of(bits))); });
  tell_of_words("power of two", [](uint32_t bits) { return one_nan(group_scale_power(magnitude_of(bits))); });
  tell_of_words("MXFP8 scale", [](uint32_t bits) { return mxfp8_scale(magnitude_of(bits)); });
  tell_of_words("NVFP4 scale", [&](uint32_t bits) { return nvfp4_block(magnitude_of(bits), global).scale; });
  tell_of_words("NVFP4 factor",
                [&](uint32_t bits) { return one_nan(nvfp4_block(magnitude_of(bits), global).scaled.factor); });
  tell_of_words("rstd", [](uint32_t bits) { return one_nan(reciprocal_root(as_float(bits), 2880.0f, 1e-6f)); });
}

// ---- of calls

constexpr uint32_t kRanks = 3, kTokens = 16, kVectors = 144;  // four and a half groups of 32 vectors
constexpr Shape kLargest{kRanks, kTokens, kVectors};

uint32_t scramble(uint32_t h) {
  h = (h ^ h >> 16) * 0x7feb352du;
  h = (h ^ h >> 15) * 0x846ca68bu;
  return h ^ h >> 16;
}

// Near 1; with squares that are subnormal, or in fp16 elements that are; far apart; any bits at all, NaN among them.
enum class Kind : uint32_t { near_one, small, wide, any };
constexpr const char* kKindNames[] = {"near 1", "small", "wide", "any bits"};

template <class D>
Vector numbers(Kind kind, uint32_t seed) {
  constexpr bool narrow = std::is_same_v<D, Float16>;
  float value[D::kPerVector];
  for (uint32_t i = 0; i < D::kPerVector; ++i) {
    const uint32_t bits = scramble(seed * 8 + i), draw = bits >> 16;
    const uint32_t exponent = kind == Kind::near_one ? 124 + draw % 6
                              : kind == Kind::small  ? (narrow ? 101 : 50) + draw % 14
                                                     : (narrow ? 103 : 72) + draw % (narrow ? 40 : 110);
    value[i] = as_float(kind == Kind::any ? bits : (bits & 0x80000000u) | exponent << 23 | scramble(bits) >> 9);
  }
  return pack<D>(value);
}

template <class D>
std::vector<Vector> rows(Kind kind, uint32_t tokens, uint32_t seed) {
  std::vector<Vector> result(tokens * kVectors);
  for (uint32_t v = 0; v < result.size(); ++v) result[v] = numbers<D>(kind, seed << 16 | v);
  return result;
}

void set_mode(bool hostile) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(hostile ? 0x1f80 | 0x8040 | 0x2000 : 0x1f80);
#else
  const uint64_t mode = hostile ? 1u << 24 | 2u << 22 : 0;
  asm volatile("msr fpcr, %0" : : "r"(mode) : "memory");
#endif
}

// What one rank is given, and what it stores; outputs that an epilogue does not have stay 0.
template <class D>
struct Tensors {
  std::vector<Vector> x, residual, weight, out{kTokens * kVectors}, residual_out{kTokens * kVectors};
  std::vector<float> weight32;
  Words quant = Words(kTokens * kVectors * 2), scale = Words(kTokens * kVectors);
  bool is_small;
  float factor = 3.7f;  // the given scale

  Tensors(Kind kind, uint32_t rank)
      : x(rows<D>(kind, kTokens, 1 + rank)),
        residual(rows<D>(kind, kTokens, 10)),
        weight(rows<D>(Kind::near_one, 1, 11)),
        is_small(kind == Kind::small) {
    for (uint32_t i = 0; i < kVectors * D::kPerVector; ++i) {
      weight32.push_back(D::load(weight[i / D::kPerVector], i % D::kPerVector) - 1.0f);
    }
  }

  // fp32 weights are less 1, as some models store them.
  epilogues::NormArguments norm(bool fp32) {
    const void* w = fp32 ? static_cast<const void*>(weight32.data()) : weight.data();
    return {residual.data(), w, residual_out.data(), is_small ? 0.0f : 1e-6f, fp32 ? 1.0f : 0.0f, fp32};
  }
  epilogues::QuantisedArguments quantised() { return {norm(false), out.data(), quant.data()}; }

  Words stored() const {
    Words words(quant);
    for (uint32_t word : scale) words.push_back(one_nan(word));
    for (const auto* each : {&out, &residual_out}) {
      for (const Vector& v : *each) {
        for (uint32_t word : v.word) words.push_back(D::kPerVector == 4 ? one_nan(word) : word);
      }
    }
    return words;
  }
};

struct Ranks {
  uint64_t slot_bytes = std::max(one_shot_vectors(kLargest), two_shot_vectors(kLargest)) * kVectorBytes;
  Orders orders{.deadline_ns = 60'000'000'000u, .hold_ns = 0, .answered = 0};
  std::vector<Block> blocks;

  Ranks() {
    while (blocks.size() < kRanks) blocks.push_back(make_block(slot_bytes));
  }

  // One call: what a rank stores, which all do alike. `arguments` makes the epilogue's of a rank's tensors.
  template <class E, class D>
  Words call(Op op, Dtype dtype, Kind kind, Strategy strategy, bool hostile, auto arguments) {
    Words stored[kRanks];
    std::vector<std::thread> threads;
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      threads.emplace_back([&, rank] {
        Tensors<D> t(kind, rank);
        FaultRecord record{};
        epilogues::CallOf<E> one{{arguments(t)}, params_of(rank, blocks, slot_bytes, orders)};
        one.group.record = &record;
        one.tensors = {t.x.data(), kTokens, kVectors, 0, kTokens, describe(op, dtype, strategy, kVectors, 0, 0), {}};
#ifdef MNNVL_AR_TEST_BUILD
        one.sabotage.broken = rule_bit(Rule::float_mode);
#endif
        set_mode(hostile);
        const bool ok = host::run<E>(one, dtype);
        set_mode(false);
        if (!ok) {
          std::fprintf(stderr, "rank %u: fault %u\n", rank, static_cast<uint32_t>(record.code));
          std::_Exit(3);
        }
        stored[rank] = t.stored();
      });
    }
    for (std::thread& thread : threads) thread.join();
    return stored[0] == stored[1] && stored[0] == stored[2] ? stored[0] : Words{};
  }

  template <class E, class D>
  void tell_of(const std::string& what, Op op, Dtype dtype, auto arguments) {
    for (Kind kind : {Kind::near_one, Kind::small, Kind::wide, Kind::any}) {
      const std::string name = what + ", " + kKindNames[static_cast<uint32_t>(kind)];
      const Words words = call<E, D>(op, dtype, kind, Strategy::one_shot, false, arguments);
      const bool alike = !words.empty() && words == call<E, D>(op, dtype, kind, Strategy::two_shot, false, arguments) &&
                         words == call<E, D>(op, dtype, kind, Strategy::one_shot, true, arguments) &&
                         words == call<E, D>(op, dtype, kind, Strategy::two_shot, true, arguments);
      if (!alike) {
        std::fprintf(stderr, "%s: ranks, strategies or floating-point modes differ\n", name.c_str());
        std::exit(2);
      }
      tell(name, words);
    }
  }
};

template <class D>
void tell_of_dtype(Ranks& ranks, const std::string& dtype_name, Dtype dtype) {
  using T = Tensors<D>;
  const auto plain = [](T& t) { return epilogues::Plain::Arguments{t.out.data()}; };
  const auto norm = [](T& t) { return epilogues::RmsNorm::Arguments{t.norm(false), t.out.data()}; };
  const auto norm32 = [](T& t) { return epilogues::RmsNorm::Arguments{t.norm(true), t.out.data()}; };
  ranks.tell_of<epilogues::Plain, D>("sum " + dtype_name, Op::all_reduce, dtype, plain);
  ranks.tell_of<epilogues::RmsNorm, D>("norm " + dtype_name, Op::all_reduce_rms_norm, dtype, norm);
  ranks.tell_of<epilogues::RmsNorm, D>("norm " + dtype_name + " by fp32", Op::all_reduce_rms_norm, dtype, norm32);
  if constexpr (D::kPerVector == 8) {
    const auto fixed = [](T& t) { return epilogues::StaticFp8::Arguments{t.quantised(), &t.factor}; };
    const auto token = [](T& t) { return epilogues::PerTokenFp8::Arguments{t.quantised(), t.scale.data()}; };
    ranks.tell_of<epilogues::StaticFp8, D>("static FP8 " + dtype_name, Op::all_reduce_rms_norm_static_fp8, dtype,
                                           fixed);
    ranks.tell_of<epilogues::PerTokenFp8, D>("per-token FP8 " + dtype_name, Op::all_reduce_rms_norm_per_token_fp8,
                                             dtype, token);
    const auto blocks = [&](const char* name, BlockFormat format, bool of_bytes, Op op) {
      ranks.tell_of<epilogues::BlockScaled, D>(name + dtype_name, op, dtype, [=](T& t) {
        const epilogues::BlockScales scales(t.scale.data(), epilogues::ScaleOrder::rows, of_bytes, kTokens,
                                            kVectors >> epilogues::block_shift(format));
        return epilogues::BlockScaled::Arguments{t.quantised(), format, scales, &t.factor};
      });
    };
    blocks("per-group FP8 ", BlockFormat::group, false, Op::all_reduce_rms_norm_per_token_group_fp8);
    blocks("per-group FP8 by powers ", BlockFormat::group_power_of_two, false,
           Op::all_reduce_rms_norm_per_token_group_fp8);
    blocks("per-group FP8 by e8m0 ", BlockFormat::group_ue8m0, true, Op::all_reduce_rms_norm_per_token_group_fp8);
    blocks("MXFP8 ", BlockFormat::mxfp8, true, Op::all_reduce_rms_norm_mxfp8);
    blocks("NVFP4 ", BlockFormat::nvfp4, true, Op::all_reduce_rms_norm_nvfp4);
  }
}

}  // namespace

int main() {
  tell_of_all_words();
  Ranks ranks;
  tell_of_dtype<Bfloat16>(ranks, "bf16", Dtype::bfloat16);
  tell_of_dtype<Float16>(ranks, "fp16", Dtype::float16);
  tell_of_dtype<Float32>(ranks, "fp32", Dtype::float32);
}
