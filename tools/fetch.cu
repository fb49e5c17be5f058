// What instructions cost that have not been fetched before: clocks of a line of them, alone and beside warps on other lines.
//
//   nvcc -std=c++20 -O3 -arch=native -o fetch tools/fetch.cu && ./fetch
//
// Takes seconds, on one GPU. Between GEMMs a kernel's code is fetched anew for each call, and each of its lines runs once
// (docs/log/2026-11-29-between-gemms.md). Two questions: is a warp kept up by the time of each fetch, or all warps of an SM by how much
// can be fetched at once? And what does code cost that is jumped over?
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, #call)

constexpr int kLength = 512;  // instructions in a line
constexpr int kRounds = 41;   // of which the median is printed

__device__ __forceinline__ uint32_t clock32() {
  uint32_t now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  return now;
}

// Sixteen multiply-adds, four of them side by side, so that none waits for the one before. The number makes lines differ.
#define FOUR                                                                                                          \
  "mad.lo.u32 %0, %0, %4, %5;\n\tmad.lo.u32 %1, %1, %4, %5;\n\tmad.lo.u32 %2, %2, %4, %5;\n\tmad.lo.u32 %3, %3, %4, " \
  "%5;\n\t"
#define SIXTEEN FOUR FOUR FOUR FOUR
#define MANY SIXTEEN SIXTEEN SIXTEEN SIXTEEN SIXTEEN SIXTEEN SIXTEEN SIXTEEN  // 128
#define MAD(text) asm volatile(text : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3]) : "r"(v[4]), "n"(kLine))

using Values = uint32_t[5];

// kSkip: behind every sixteen another sixteen that are jumped over.
template <int kLine, bool kSkip>
__device__ __forceinline__ void line(Values& v, bool never) {
#pragma unroll
  for (int i = 0; i < kLength / 16; ++i) {
    MAD(SIXTEEN);
    if (kSkip && never) {
      MAD(SIXTEEN);
      __nanosleep(1);  // not to be made predicates of
    }
  }
}

template <int kLine, bool kSkip>
__device__ __noinline__ void run(uint32_t* clocks, uint32_t seed, bool never) {
  Values v = {seed, seed + 1, seed + 2, seed + 3, seed | 1};
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {  // not fetched, fetched
    const uint32_t began = clock32();
    line<kLine, kSkip>(v, never);
    if (threadIdx.x % 32 == 0) clocks[pass] = clock32() - began;
  }
  if (v[0] + v[1] + v[2] + v[3] == 12345) clocks[2] = v[0];
}

// Warp w runs line w % lines. `clocks`: four words a warp, of which the first two are the passes.
template <bool kSkip>
__global__ void lines(uint32_t* clocks, uint32_t lines, uint32_t seed, bool never) {
  uint32_t* const mine = clocks + threadIdx.x / 32 * 4;
  __syncthreads();
  switch (threadIdx.x / 32 % lines) {
    case 0: return run<0, kSkip>(mine, seed, never);
    case 1: return run<1, kSkip>(mine, seed, never);
    case 2: return run<2, kSkip>(mine, seed, never);
    default: return run<3, kSkip>(mine, seed, never);
  }
}

// More code than any cache of instructions holds: 512 KiB.
template <int kLine>
__device__ __noinline__ void much(Values& v) {
#pragma unroll
  for (int i = 0; i < 32; ++i) MAD(MANY);
}
__global__ void flush(uint32_t* out, uint32_t seed) {
  Values v = {seed, seed + 1, seed + 2, seed + 3, seed | 1};
  much<16>(v), much<17>(v), much<18>(v), much<19>(v), much<20>(v), much<21>(v), much<22>(v), much<23>(v);
  if (v[0] + v[1] + v[2] + v[3] == 12345) *out = v[0];
}

struct Memory {
  uint32_t *clocks, *out;
  uint8_t* large;
  size_t bytes;
};

// Median clocks an instruction, of the slowest warp: {not fetched, fetched}.
template <bool kSkip>
std::pair<double, double> measure(const Memory& memory, uint32_t warps, uint32_t count, bool from_memory) {
  std::vector<double> cold, warm;
  for (int round = 0; round < kRounds; ++round) {
    flush<<<132, 32>>>(memory.out, round);
    if (from_memory) CHECK(cudaMemsetAsync(memory.large, round, memory.bytes));
    lines<kSkip><<<1, warps * 32>>>(memory.clocks, count, round, false);
    std::vector<uint32_t> found(warps * 4);
    CHECK(cudaMemcpy(found.data(), memory.clocks, found.size() * 4, cudaMemcpyDeviceToHost));
    uint32_t most[2] = {};
    for (uint32_t warp = 0; warp < warps; ++warp) {
      for (int pass : {0, 1}) most[pass] = std::max(most[pass], found[warp * 4 + pass]);
    }
    cold.push_back(most[0]), warm.push_back(most[1]);
  }
  const auto median = [](std::vector<double>& v) {
    std::nth_element(v.begin(), v.begin() + v.size() / 2, v.end());
    return v[v.size() / 2] / kLength;
  };
  return {median(cold), median(warm)};
}

}  // namespace

int main() {
  Memory memory{};
  memory.bytes = size_t{256} << 20;
  CHECK(cudaMalloc(&memory.clocks, 4096));
  CHECK(cudaMalloc(&memory.out, 4));
  CHECK(cudaMalloc(&memory.large, memory.bytes));
  std::printf("clocks an instruction, lines of %d, the slowest warp's\n", kLength);
  std::printf("%-44s %10s %10s %10s\n", "", "from L2", "memory", "fetched");
  const auto row = [&](const char* what, uint32_t warps, uint32_t count, bool skips) {
    const auto near = skips ? measure<true>(memory, warps, count, false) : measure<false>(memory, warps, count, false);
    const auto far = skips ? measure<true>(memory, warps, count, true) : measure<false>(memory, warps, count, true);
    std::printf("%-44s %10.2f %10.2f %10.2f\n", what, near.first, far.first, near.second);
  };
  row("one warp", 1, 1, false);
  row("four warps, one line", 4, 1, false);
  row("two warps, a line each", 2, 2, false);
  row("four warps, a line each", 4, 4, false);
  row("sixteen warps, four lines", 16, 4, false);
  row("one warp, half of the code jumped over", 1, 1, true);
  row("four warps, a line each, half jumped over", 4, 4, true);
  CHECK(cudaDeviceSynchronize());
  return 0;
}
