// Every 32-bit word through the library's own device functions, on a GPU: what is sent, stored, loaded and taken for
// data; and its conversions and roots against the host's. Prints one line of JSON. tests/gpu/test_exhaustive.py says
// what to expect.
//
// Compiled with -DMNNVL_AR_TEST_BUILD, so that the old compare and unsanitised sending can be asked for (sabotage.h),
// and with the library's own floating-point flags.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "kernels/receive.cuh"
#include "kernels/root.cuh"
#include "protocol/numerics_fp4.h"

using namespace mnnvl_ar;
using protocol::Bfloat16;
using protocol::Float16;
using protocol::Params;
using protocol::Vector;

namespace {

constexpr uint64_t kWords = uint64_t{1} << 32;
constexpr uint32_t kBlocks = 2048, kThreads = 256, kBins = 4096;
constexpr uint64_t kShare = kWords / kBins;  // words of a bin
constexpr uint32_t kOthers = 0x3f803f80u;    // what stands in the three other words of a vector: always there

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

struct Counts {
  unsigned long long sentinels;  // vectors sent with the sentinel in them
  unsigned long long lost;       // not taken for data: the receiver would wait for ever
  unsigned long long changed;    // came as something other than sent, but for 0x80000000 -> 0
  unsigned int first_lost, last_lost;
};

// Sends each word in one position of a vector, the way a kernel does, and looks at it the way a kernel does.
__global__ void wire(const __grid_constant__ Params p, uint32_t position, uint8_t* scratch, Counts* counts) {
  const uint64_t thread = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x, threads = uint64_t{gridDim.x} * blockDim.x;
  uint8_t* place = scratch + thread * protocol::kVectorBytes;
  Counts mine{0, 0, 0, 0xffffffffu, 0};
  for (uint64_t i = thread; i < kWords; i += threads) {
    const auto word = static_cast<uint32_t>(i);
    Vector v{{kOthers, kOthers, kOthers, kOthers}};
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) {
      if (k == position) v.word[k] = word;
    }
    const Vector sent = kernels::for_the_wire(p, v);
    ptx::store_relaxed_sys(place, sent);
    const Vector got = ptx::load_relaxed_sys(place);
    bool has_sentinel = false, is_changed = false;
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) {
      has_sentinel |= sent.word[k] == protocol::kSentinel;
      is_changed |= got.word[k] != v.word[k] && !(v.word[k] == protocol::kSentinel && got.word[k] == 0);
    }
    mine.sentinels += has_sentinel;
    mine.changed += is_changed;
    if (!kernels::has_arrived(p, got)) {
      ++mine.lost;
      mine.first_lost = min(mine.first_lost, word);
      mine.last_lost = max(mine.last_lost, word);
    }
  }
  if (mine.sentinels != 0) atomicAdd(&counts->sentinels, mine.sentinels);
  if (mine.changed != 0) atomicAdd(&counts->changed, mine.changed);
  if (mine.lost != 0) {
    atomicAdd(&counts->lost, mine.lost);
    atomicMin(&counts->first_lost, mine.first_lost);
    atomicMax(&counts->last_lost, mine.last_lost);
  }
}

// Tells any two answers apart, and where they stood.
MNNVL_AR_HD uint64_t mix(uint64_t answer, uint32_t word) {
  uint64_t h = (answer + 1) * 0x9e3779b97f4a7c15ull ^ (uint64_t{word} + 1) * 0xc2b2ae3d27d4eb4full;
  h = (h ^ h >> 32) * 0xd6e8feb86659fd93ull;
  return h ^ h >> 29;
}

// What a conversion gives for a word, in the order in which the host and the device are to agree.
struct ToBfloat16 {
  static MNNVL_AR_HD uint64_t of(uint32_t w) { return Bfloat16::round2(protocol::as_float(w), protocol::as_float(~w)); }
};
struct ToFloat16 {
  static MNNVL_AR_HD uint64_t of(uint32_t w) { return Float16::round2(protocol::as_float(w), protocol::as_float(~w)); }
};
struct ToBfloat16ByBits {  // the device's round() too: the same integers as the host's
  static MNNVL_AR_HD uint64_t of(uint32_t w) { return Bfloat16::round(protocol::as_float(w)); }
};
struct ToFloat16ByBits {
  static MNNVL_AR_HD uint64_t of(uint32_t w) { return Float16::round(protocol::as_float(w)); }
};
struct Root {  // any NaN counts as the same NaN
  static MNNVL_AR_HD uint64_t of(uint32_t w) {
    const uint32_t bits = protocol::as_bits(protocol::reciprocal_root(protocol::as_float(w), 2880.0f, 1e-6f));
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;
  }
};
struct AddMultiply {  // a contraction would show; operands of all magnitudes, subnormal results
  static MNNVL_AR_HD uint64_t of(uint32_t w) {
    const float a = protocol::as_float(w), b = protocol::as_float(w * 2654435761u + 12345u);
    const uint32_t bits = protocol::as_bits(protocol::add(b, protocol::mul(a, a)));
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;
  }
};

// Codes of a word, in each place that an instruction may give them, and by integers alone.
struct ToE4m3 {
  static MNNVL_AR_HD uint64_t of(uint32_t w) {
    const uint32_t codes = protocol::e4m3x4(protocol::as_float(w), protocol::as_float(~w),
                                            protocol::as_float(w + 0x9e3779b9u), protocol::as_float(w * 2654435761u));
    return codes | uint64_t{protocol::e4m3(protocol::as_float(w))} << 32;
  }
};
struct OneOtherE4m3 {  // the control: on the device, one word of all is another code
  static MNNVL_AR_HD uint64_t of(uint32_t w) {
#if defined(__CUDA_ARCH__)
    if (w == 0x3a800001u) return ToE4m3::of(w) ^ 1u;
#endif
    return ToE4m3::of(w);
  }
};
struct ToE2m1AndE8m0 {
  static MNNVL_AR_HD uint64_t of(uint32_t w) {
    return protocol::e2m1(protocol::as_float(w)) | protocol::e8m0_up(protocol::as_float(w)) << 8;
  }
};
// Scales of a largest magnitude, and what elements are multiplied by.
struct ToScales {
  static MNNVL_AR_HD uint64_t of(uint32_t w) {
    const uint32_t most = protocol::magnitude_of(w), mx = protocol::mxfp8_scale(most);
    return mix(protocol::as_bits(protocol::token_scale(most)), 0) ^
           mix(protocol::as_bits(protocol::group_scale(most)), 1) ^
           mix(protocol::as_bits(protocol::group_scale_power(most)), 2) ^
           mix(protocol::as_bits(protocol::group_power_factor(most).factor), 3) ^
           mix(mx | uint64_t{protocol::as_bits(protocol::mxfp8_factor(mx).factor)} << 32, 4);
  }
};
struct ToNvfp4 {  // under global scales of all magnitudes
  static MNNVL_AR_HD uint64_t of(uint32_t w) {
    const protocol::Nvfp4Block block =
        protocol::nvfp4_block(protocol::magnitude_of(w), protocol::nvfp4_global(protocol::as_float(w * 2654435761u)));
    return block.scale | uint64_t{protocol::as_bits(block.scaled.factor)} << 32;
  }
};

// One bin a block: the sum, modulo 2^64, of the mixed answers for its words.
template <class F>
__global__ void digest(unsigned long long* bins) {
  uint64_t sum = 0;
  for (uint64_t i = threadIdx.x; i < kShare; i += blockDim.x) {
    const auto word = static_cast<uint32_t>(blockIdx.x * kShare + i);
    sum += mix(F::of(word), word);
  }
  atomicAdd(&bins[blockIdx.x], static_cast<unsigned long long>(sum));
}

// How many bins differ between host and device: none, if they agree on every word.
template <class F>
unsigned differing_bins() {
  unsigned long long* bins;
  check(cudaMalloc(&bins, kBins * sizeof *bins), "cudaMalloc");
  check(cudaMemset(bins, 0, kBins * sizeof *bins), "cudaMemset");
  digest<F><<<kBins, kThreads>>>(bins);
  check(cudaGetLastError(), "launch");
  std::vector<uint64_t> here(kBins);
  const unsigned workers = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (unsigned worker = 0; worker < workers; ++worker) {
    threads.emplace_back([&here, worker, workers] {
      for (uint32_t bin = worker; bin < kBins; bin += workers) {
        uint64_t sum = 0;
        for (uint64_t i = 0; i < kShare; ++i) {
          const auto word = static_cast<uint32_t>(bin * kShare + i);
          sum += mix(F::of(word), word);
        }
        here[bin] = sum;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<unsigned long long> there(kBins);
  check(cudaMemcpy(there.data(), bins, kBins * sizeof *bins, cudaMemcpyDeviceToHost), "cudaMemcpy");
  cudaFree(bins);
  unsigned differing = 0;
  for (uint32_t bin = 0; bin < kBins; ++bin) differing += here[bin] != there[bin];
  return differing;
}

// Loads all 2^16 halves as both elements of a word, on the device.
__global__ void load_all(uint32_t* bfloat16, uint32_t* float16) {
  const uint32_t half = blockIdx.x * blockDim.x + threadIdx.x;
  const Vector v{{half, half << 16, 0, 0}};
  bfloat16[2 * half] = protocol::as_bits(Bfloat16::load(v, 0));
  bfloat16[2 * half + 1] = protocol::as_bits(Bfloat16::load(v, 3));
  float16[2 * half] = protocol::as_bits(Float16::load(v, 0));
  float16[2 * half + 1] = protocol::as_bits(Float16::load(v, 3));
}

bool same(uint32_t a, uint32_t b) {
  return a == b || ((a & 0x7fffffffu) > 0x7f800000u && (b & 0x7fffffffu) > 0x7f800000u);
}

unsigned differing_loads() {
  constexpr uint32_t kHalves = 1u << 16;
  uint32_t* device;
  check(cudaMalloc(&device, 4 * kHalves * sizeof *device), "cudaMalloc");
  load_all<<<kHalves / kThreads, kThreads>>>(device, device + 2 * kHalves);
  check(cudaGetLastError(), "launch");
  std::vector<uint32_t> there(4 * kHalves);
  check(cudaMemcpy(there.data(), device, 4 * kHalves * sizeof *device, cudaMemcpyDeviceToHost), "cudaMemcpy");
  cudaFree(device);
  unsigned differing = 0;
  for (uint32_t half = 0; half < kHalves; ++half) {
    const Vector v{{half, half << 16, 0, 0}};
    for (uint32_t k = 0; k < 2; ++k) {
      differing += !same(there[2 * half + k], protocol::as_bits(Bfloat16::load(v, k == 0 ? 0 : 3)));
      differing += !same(there[2 * kHalves + 2 * half + k], protocol::as_bits(Float16::load(v, k == 0 ? 0 : 3)));
    }
  }
  return differing;
}

// 1, with an eps of 0, hands every word to the root as it is; others are hidden sizes of models, and extremes.
constexpr uint32_t kHidden[] = {1,    8,    2048, 2560, 2880, 3072, 3584, 4096,  4608,  5120,  5376,  6144,
                                6656, 7168, 8192, 8064, 8184, 9216, 9728, 11008, 12288, 14336, 16376, 16384};

__global__ void compare_roots(float hidden, float eps, unsigned long long* differing) {
  const kernels::ReciprocalRoot quick(hidden);
  const uint64_t thread = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x, threads = uint64_t{gridDim.x} * blockDim.x;
  unsigned long long mine = 0;
  for (uint64_t word = thread; word < kWords; word += threads) {
    const float q = protocol::as_float(static_cast<uint32_t>(word));
    const uint32_t a = protocol::as_bits(quick(q, eps)),
                   b = protocol::as_bits(protocol::reciprocal_root(q, hidden, eps));
    mine += a != b && !((a & 0x7fffffffu) > 0x7f800000u && (b & 0x7fffffffu) > 0x7f800000u);
  }
  if (mine != 0) atomicAdd(differing, mine);
}

// The kernels' root against the one of the protocol, on the device: of every sum of squares, for every size and some eps.
unsigned long long differing_quick_roots() {
  unsigned long long* device;
  unsigned long long found = 0;
  check(cudaMalloc(&device, sizeof *device), "cudaMalloc");
  check(cudaMemset(device, 0, sizeof *device), "cudaMemset");
  for (uint32_t hidden : kHidden) {
    for (float eps : {0.0f, 1e-6f, 1e-5f, 0.25f}) {
      compare_roots<<<kBlocks, kThreads>>>(static_cast<float>(hidden), eps, device);
      check(cudaGetLastError(), "launch");
    }
  }
  check(cudaMemcpy(&found, device, sizeof found, cudaMemcpyDeviceToHost), "cudaMemcpy");
  cudaFree(device);
  return found;
}

// Every significand of 11 bits, as those of fp16 and bf16 are, over every one of 24.
__global__ void compare_quotients(unsigned long long* differing) {
  const uint64_t thread = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x, threads = uint64_t{gridDim.x} * blockDim.x;
  unsigned long long mine = 0;
  for (uint64_t divisor = thread; divisor < 1u << 23; divisor += threads) {
    const float b = protocol::as_float(0x3f800000u | static_cast<uint32_t>(divisor));
    const float reciprocal = protocol::divide(1.0f, b);
    for (uint32_t significand = 0; significand < 1u << 10; ++significand) {
      const float a = protocol::as_float((significand & 1u) << 31 | 0x3f800000u | significand << 13);
      mine += protocol::as_bits(protocol::divide_by(a, b, reciprocal)) != protocol::as_bits(protocol::divide(a, b));
    }
  }
  if (mine != 0) atomicAdd(differing, mine);
}

// And what the elements of a vector become by the scale of their largest: of all magnitudes, zeros, infinities and NaN. In three of
// four the largest is finite.
struct ToQuotients {
  template <class D>
  static MNNVL_AR_HD uint32_t codes(const Vector& v) {
    const uint32_t most = protocol::largest<D>(v);
    const protocol::Codes8 a = protocol::e4m3_codes<D>(v, protocol::Over(protocol::group_scale(most)));
    const protocol::Codes8 b = protocol::e4m3_codes<D>(v, protocol::Over(protocol::token_scale(most)));
    return a.word[0] ^ a.word[1] * 3u ^ b.word[0] * 5u ^ b.word[1] * 7u;
  }
  static MNNVL_AR_HD uint64_t of(uint32_t w) {
    const uint32_t some = w % 4 == 0 ? 0xffffffffu : 0xbbffbbffu;  // without a bit of the exponent
    const Vector v{{w & some, ~w & some, w << 7 & some, w * 0x9e3779b9u & some}};
    return codes<Bfloat16>(v) | uint64_t{codes<Float16>(v)} << 32;
  }
};

unsigned long long differing_quick_quotients() {
  unsigned long long* device;
  unsigned long long found = 0;
  check(cudaMalloc(&device, sizeof *device), "cudaMalloc");
  check(cudaMemset(device, 0, sizeof *device), "cudaMemset");
  compare_quotients<<<kBlocks, kThreads>>>(device);
  check(cudaGetLastError(), "launch");
  check(cudaMemcpy(&found, device, sizeof found, cudaMemcpyDeviceToHost), "cudaMemcpy");
  cudaFree(device);
  return found;
}

void print_wire(const char* name, uint32_t broken) {
  uint8_t* scratch;
  Counts* counts;
  check(cudaMalloc(&scratch, uint64_t{kBlocks} * kThreads * protocol::kVectorBytes), "cudaMalloc");
  check(cudaMalloc(&counts, sizeof *counts), "cudaMalloc");
  Params p{};
  p.sabotage.broken = broken;
  std::printf("\"%s\": [", name);
  for (uint32_t position = 0; position < 4; ++position) {
    const Counts none{0, 0, 0, 0xffffffffu, 0};
    Counts found;
    check(cudaMemcpy(counts, &none, sizeof none, cudaMemcpyHostToDevice), "cudaMemcpy");
    wire<<<kBlocks, kThreads>>>(p, position, scratch, counts);
    check(cudaGetLastError(), "launch");
    check(cudaMemcpy(&found, counts, sizeof found, cudaMemcpyDeviceToHost), "cudaMemcpy");
    std::printf("%s{\"sentinels\": %llu, \"lost\": %llu, \"changed\": %llu, \"first_lost\": %u, \"last_lost\": %u}",
                position != 0 ? ", " : "", found.sentinels, found.lost, found.changed, found.first_lost,
                found.last_lost);
  }
  std::printf("], ");
  cudaFree(scratch);
  cudaFree(counts);
}

}  // namespace

int main() {
  using protocol::Rule;
  std::printf("{\"words\": %llu, ", static_cast<unsigned long long>(kWords));
  print_wire("rule", 0);
  print_wire("old_compare", protocol::rule_bit(Rule::integer_compare));
  print_wire("unsanitised", protocol::rule_bit(Rule::sanitize));
  print_wire("first_word_only", protocol::rule_bit(Rule::sanitize) | protocol::rule_bit(Rule::every_word));
  std::printf("\"loads\": %u, \"to_bfloat16\": %u, \"to_float16\": %u, ", differing_loads(),
              differing_bins<ToBfloat16>(), differing_bins<ToFloat16>());
  std::printf("\"to_bfloat16_by_bits\": %u, \"to_float16_by_bits\": %u, ", differing_bins<ToBfloat16ByBits>(),
              differing_bins<ToFloat16ByBits>());
  std::printf("\"to_e4m3\": %u, \"one_other_e4m3\": %u, ", differing_bins<ToE4m3>(), differing_bins<OneOtherE4m3>());
  std::printf("\"to_e2m1_and_e8m0\": %u, \"to_scales\": %u, \"to_nvfp4\": %u, ", differing_bins<ToE2m1AndE8m0>(),
              differing_bins<ToScales>(), differing_bins<ToNvfp4>());
  std::printf("\"to_quotients\": %u, \"quick_quotient\": %llu, ", differing_bins<ToQuotients>(),
              differing_quick_quotients());
  std::printf("\"root\": %u, \"quick_root\": %llu, \"add_multiply\": %u}\n", differing_bins<Root>(),
              differing_quick_roots(), differing_bins<AddMultiply>());
  return 0;
}
