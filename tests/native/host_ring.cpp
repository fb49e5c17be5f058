// The host transport with threads as ranks, for the sanitizers: ThreadSanitizer sees every access of one rank to what
// another writes, AddressSanitizer every byte outside of a block, an input or an output. No Python and no torch in the
// way.
//
//   host_ring RANKS CALLS SEED [small]
//
// Each rank makes CALLS calls, both ops and strategies, all dtypes, sizes that grow and shrink, at its own speed.
// Inputs are small integers, so that the sum is exact and known to all. `small` makes every block one vector
// shorter than its slots need: the control for AddressSanitizer. In a test build no rank clears its slots: the control
// for the sums.
//
// Exit: 0 all sums right; 2 a wrong one or ranks that differ; 3
// a fault (a deadline of a minute).
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "epilogues/plain.h"
#include "epilogues/rms_norm.h"
#include "host/one_rank.h"
#include "host_blocks.h"
#include "protocol/numerics.h"

using namespace mnnvl_ar;
using protocol::Bfloat16;
using protocol::Dtype;
using protocol::Float16;
using protocol::Float32;
using protocol::Op;
using protocol::Strategy;
using protocol::Vector;

namespace {

#ifdef MNNVL_AR_TEST_BUILD
constexpr uint64_t kDeadlineNs = 1'000'000'000u;  // of ranks whose peer has ended with a wrong sum
#else
constexpr uint64_t kDeadlineNs = 60'000'000'000u;
#endif
constexpr uint32_t kLargest = protocol::kSlots;       // calls of the largest size, which fill every slot once
constexpr uint32_t kMaxTokens = 6, kMaxVectors = 70;  // more than two groups of 32 vectors

uint32_t scramble(uint32_t h) {
  h = (h ^ h >> 16) * 0x7feb352du;
  h = (h ^ h >> 15) * 0x846ca68bu;
  return h ^ h >> 16;
}

// What every rank calls at step `call`, and what rank `rank` has there: all follow from the seed.
struct Plan {
  uint32_t seed, ranks;

  uint32_t draw(uint32_t call, uint32_t what) const { return scramble(seed ^ scramble(call * 16 + what)); }
  Op op(uint32_t call) const { return draw(call, 0) % 2 != 0 ? Op::all_reduce : Op::all_reduce_rms_norm; }
  protocol::Shape largest() const { return {ranks, kMaxTokens, kMaxVectors, false}; }
  Strategy strategy(uint32_t call) const {
    const bool fills = protocol::one_shot_vectors(largest()) >= protocol::two_shot_vectors(largest());
    return (call < kLargest ? fills : draw(call, 1) % 2 != 0) ? Strategy::one_shot : Strategy::two_shot;
  }
  Dtype dtype(uint32_t call) const { return Dtype{draw(call, 2) % 3}; }
  uint32_t tokens(uint32_t call) const { return call < kLargest ? kMaxTokens : 1 + draw(call, 3) % kMaxTokens; }
  uint32_t vectors(uint32_t call) const { return call < kLargest ? kMaxVectors : 1 + draw(call, 4) % kMaxVectors; }
  float value(uint32_t call, uint32_t rank, uint32_t i) const {
    return static_cast<float>(scramble(draw(call, 5 + rank) + i) % 9) - 4.0f;
  }
};

template <class D>
std::vector<Vector> rows(uint32_t vectors, auto value) {
  std::vector<Vector> result(vectors);
  for (uint32_t v = 0; v < vectors; ++v) {
    float elements[D::kPerVector];
    for (int i = 0; i < D::kPerVector; ++i) elements[i] = value(v * D::kPerVector + i);
    result[v] = protocol::pack<D>(elements);
  }
  return result;
}

struct Rank {
  const Plan& plan;
  uint32_t rank;
  protocol::Params params;
  protocol::FaultRecord record{};
  uint64_t digest = 0;  // of all outputs: the same on every rank

  template <class D>
  int call(uint32_t n) {
    protocol::Params p = params;
    const uint32_t all = plan.tokens(n) * plan.vectors(n);
    const auto x = rows<D>(all, [&](uint32_t i) { return plan.value(n, rank, i); });
    const auto sum = rows<D>(all, [&](uint32_t i) {
      float total = 0;
      for (uint32_t source = 0; source < plan.ranks; ++source) total += plan.value(n, source, i);
      return total;
    });
    const auto residual = rows<D>(all, [](uint32_t) { return 0.0f; });  // so residual_out is the sum
    const auto weight = rows<D>(plan.vectors(n), [](uint32_t i) { return 1.0f + static_cast<float>(i % 3); });
    std::vector<Vector> out(all), residual_out(all);
    p.group.record = &record;
    const Op op = plan.op(n);
    p.tensors = {.x = x.data(),
                 .tokens = plan.tokens(n),
                 .vectors = plan.vectors(n),
                 .first_token = 0,
                 .call_tokens = plan.tokens(n),
                 .description = protocol::describe(op, plan.dtype(n), plan.strategy(n), plan.vectors(n), 0, 0),
                 .numbers = {}};
    const bool ok =
        op == Op::all_reduce
            ? host::run<epilogues::Plain>({{{out.data()}}, p}, plan.dtype(n))
            : host::run<epilogues::RmsNorm>(
                  {{{{residual.data(), weight.data(), residual_out.data(), 1e-6f, 0.0f, 0}, out.data()}}, p},
                  plan.dtype(n));
    if (!ok) {
      std::fprintf(stderr, "rank %u: fault %u in call %u, peer %u\n", rank, static_cast<uint32_t>(record.code), n,
                   record.peer);
      return 3;
    }
    const auto& summed = op == Op::all_reduce ? out : residual_out;
    if (std::memcmp(summed.data(), sum.data(), all * sizeof(Vector)) != 0) {
      std::fprintf(stderr, "rank %u: a wrong sum in call %u\n", rank, n);
      return 2;
    }
    for (const Vector& v : out) {
      for (uint32_t word : v.word) digest = (digest ^ word) * 0x100000001b3ull;
    }
    return 0;
  }

  int run(uint32_t calls) {
    for (uint32_t n = 0; n < calls; ++n) {
      int code = 0;
      switch (plan.dtype(n)) {
        case Dtype::bfloat16: code = call<Bfloat16>(n); break;
        case Dtype::float16: code = call<Float16>(n); break;
        case Dtype::float32: code = call<Float32>(n); break;
      }
      if (code != 0) return code;
      if (scramble(n * 64 + rank) % 8 == 0) std::this_thread::yield();  // ranks at their own speed
    }
    return 0;
  }
};

}  // namespace

int main(int count, char** words) {
  if (count < 4) return std::fprintf(stderr, "usage: host_ring RANKS CALLS SEED [small]\n"), 1;
  const auto ranks = static_cast<uint32_t>(std::atoi(words[1])), calls = static_cast<uint32_t>(std::atoi(words[2]));
  const Plan plan{static_cast<uint32_t>(std::atoi(words[3])), ranks};
  const uint64_t missing = count > 4 && std::string(words[4]) == "small" ? protocol::kVectorBytes : 0;
  const uint64_t needed =
      std::max(protocol::one_shot_vectors(plan.largest()), protocol::two_shot_vectors(plan.largest()));
  const uint64_t slot_bytes = needed * protocol::kVectorBytes;

  const protocol::Orders orders{.deadline_ns = kDeadlineNs, .hold_ns = 0, .answered = 0};
  std::vector<Block> blocks;
  for (uint32_t rank = 0; rank < ranks; ++rank) blocks.push_back(make_block(slot_bytes, missing));
  std::vector<std::unique_ptr<Rank>> all;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    protocol::Params p = params_of(rank, blocks, slot_bytes, orders);
#ifdef MNNVL_AR_TEST_BUILD
    p.sabotage.broken = protocol::rule_bit(protocol::Rule::clear);
#endif
    all.push_back(std::make_unique<Rank>(Rank{plan, rank, p}));
  }
  std::atomic<int> worst{0};
  std::vector<std::thread> threads;
  for (auto& rank : all) {
    threads.emplace_back([&worst, calls, one = rank.get()] {
      const int code = one->run(calls);
      int before = worst.load();
      while (before < code && !worst.compare_exchange_weak(before, code)) {
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (worst != 0) return worst;
  for (const auto& rank : all) {
    if (rank->digest != all[0]->digest) return std::fprintf(stderr, "rank %u differs\n", rank->rank), 2;
  }
  std::printf("%u ranks, %u calls: every sum right, outputs the same on all ranks\n", ranks, calls);
  return 0;
}
