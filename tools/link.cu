// Which bandwidth a kernel reaches between two GPUs, and how long an SM's stores to a peer delay its next load: two tables.
//
//   nvcc -std=c++20 -O3 -arch=native -Icsrc -o link tools/link.cu && ./link
//
// Takes seconds. Unicast between GPU 0 and 1, by cudaMalloc and peer access; docs/log/2026-11-22-link.md has the
// figures.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "kernels/ptx.cuh"

namespace {

namespace ptx = mnnvl_ar::ptx;  // the loads and stores of the library itself

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, #call)

constexpr int kThreads = 448;
constexpr uint32_t kChunk = 512;  // bytes of a bulk copy: what a warp stores at once

// Uses all four words: the compiler would not load those that are not used.
__device__ uint32_t every_word(const ptx::Vector& v) { return v.word[0] ^ v.word[1] ^ v.word[2] ^ v.word[3]; }
__device__ void bulk_store(void* to, const void* shared) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(kChunk)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ void await_bulk() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

enum class How { store, copy, bulk, pull };
constexpr std::pair<How, const char*> kHows[] = {{How::store, "stores, nothing read"},
                                                 {How::copy, "stores of what is read"},
                                                 {How::bulk, "bulk copies from shared memory"},
                                                 {How::pull, "loads from the peer"}};

// All `vectors` of 16 bytes between `here` and the peer's `there`.
__global__ void __launch_bounds__(kThreads) transfer(How how, uint8_t* there, uint8_t* here, uint32_t vectors) {
  __shared__ alignas(128) uint8_t chunk[kThreads * 16];
  uint32_t kept = 0;
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < vectors; i += gridDim.x * kThreads) {
    uint8_t *far = there + uint64_t{i} * 16, *near = here + uint64_t{i} * 16;
    if (how == How::store) ptx::store_relaxed_sys(far, {{i, i, i, i}});
    if (how == How::copy) ptx::store_relaxed_sys(far, ptx::load_relaxed_sys(near));
    if (how == How::bulk && threadIdx.x % 32 == 0) bulk_store(far, chunk + threadIdx.x * 16);
    if (how == How::pull) kept ^= every_word(ptx::load_relaxed_sys(far));
  }
  if (how == How::bulk) await_bulk();
  if (kept == 0x12345) ptx::store_relaxed_sys(here, {});  // keeps the compiler from dropping the loads
}

// Each thread sends one vector, then loads one of its own GPU's. spent: clocks of that load, by warp.
__global__ void __launch_bounds__(kThreads) load_after_send(How how, uint8_t* there, uint8_t* here, uint32_t* spent) {
  __shared__ alignas(128) uint8_t chunk[kThreads * 16];
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (how == How::store) ptx::store_relaxed_sys(there + i * 16, {{i, i, i, i}});
  if (how == How::bulk && threadIdx.x % 32 == 0) bulk_store(there + i * 16, chunk + threadIdx.x * 16);
  __syncwarp();
  const uint32_t began = ptx::clock();
  const bool odd = every_word(ptx::load_relaxed_sys(here + i * 16)) == 0x12345;
  __syncwarp();
  if (threadIdx.x % 32 == 0) spent[i / 32] = ptx::clock() - began + odd;
  if (how == How::bulk) await_bulk();
}

struct Gpu {
  uint8_t *in, *out;
  uint32_t* spent;
  cudaEvent_t began, ended;
};

constexpr size_t kBytes = 256 << 20;
Gpu gpus[2];

double transfer_us(How how, int grid, uint32_t vectors, int senders) {
  constexpr int kRepeats = 20;
  float worst = 0;
  for (int turn = 0; turn < 2; ++turn) {  // the first one warms up
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      for (int d = 0; d < senders; ++d) {
        CHECK(cudaSetDevice(d));
        if (repeat == 0) CHECK(cudaEventRecord(gpus[d].began));
        transfer<<<grid, kThreads>>>(how, gpus[1 - d].in, gpus[d].out, vectors);
        if (repeat + 1 == kRepeats) CHECK(cudaEventRecord(gpus[d].ended));
      }
    }
    worst = 0;
    for (int d = 0; d < senders; ++d) {
      CHECK(cudaEventSynchronize(gpus[d].ended));
      float ms = 0;
      CHECK(cudaEventElapsedTime(&ms, gpus[d].began, gpus[d].ended));
      worst = std::max(worst, ms);
    }
  }
  return worst * 1e3 / kRepeats;
}

void print_load_after_send(const char* name, How how, int grid) {
  for (int turn = 0; turn < 3; ++turn) {
    for (int d = 0; d < 2; ++d) {
      CHECK(cudaSetDevice(d));
      load_after_send<<<grid, kThreads>>>(how, gpus[1 - d].in, gpus[d].out, gpus[d].spent);
    }
    for (int d = 0; d < 2; ++d) CHECK((cudaSetDevice(d), cudaDeviceSynchronize()));
  }
  std::vector<uint32_t> spent(grid * kThreads / 32);
  CHECK(cudaMemcpy(spent.data(), gpus[0].spent, spent.size() * 4, cudaMemcpyDeviceToHost));
  std::sort(spent.begin(), spent.end());
  std::printf("%-32s %6u %6u clocks (median, 90th percentile)\n", name, spent[spent.size() / 2],
              spent[spent.size() * 9 / 10]);
}

}  // namespace

int main() {
  int count = 0, processors = 0;
  CHECK(cudaGetDeviceCount(&count));
  if (count < 2) return std::puts("needs two GPUs"), 1;
  CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
  for (int d = 0; d < 2; ++d) {
    CHECK(cudaSetDevice(d));
    CHECK(cudaDeviceEnablePeerAccess(1 - d, 0));
    CHECK(cudaMalloc(&gpus[d].in, kBytes));
    CHECK(cudaMalloc(&gpus[d].out, kBytes));
    CHECK(cudaMalloc(&gpus[d].spent, 1 << 20));
    CHECK(cudaEventCreate(&gpus[d].began));
    CHECK(cudaEventCreate(&gpus[d].ended));
  }
  std::puts("GB/s of one GPU, one direction alone and both at once, launch included");
  for (const auto& [how, name] : kHows) {
    for (int grid : {processors / 4, processors, 2 * processors}) {
      for (uint32_t bytes : {14680064u, 1u << 27}) {
        const double one = transfer_us(how, grid, bytes / 16, 1), both = transfer_us(how, grid, bytes / 16, 2);
        std::printf("%-32s %4d CTAs %6.1f MB %7.1f %7.1f\n", name, grid, bytes / 1e6, bytes / one / 1e3,
                    bytes / both / 1e3);
      }
    }
  }
  std::puts("a load from the own L2, both GPUs at work, behind");
  print_load_after_send("nothing", How::pull, 2 * processors);
  print_load_after_send("a vector a thread stored", How::store, 2 * processors);
  print_load_after_send("the same by bulk copy", How::bulk, 2 * processors);
}
