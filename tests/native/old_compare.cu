// What tests/common/sass.py has to find: the library's own waiting and summing, compiled as the test build compiles it,
// so with FlashInfer's old compare in the poll loops. Compiled to a cubin, never run.
#ifndef MNNVL_AR_TEST_BUILD
#error "compile with -DMNNVL_AR_TEST_BUILD"
#endif
#include "kernels/receive.cuh"

namespace mnnvl_ar::kernels {

__global__ void wait_by_old_compare(const __grid_constant__ Params p) {
  __shared__ CallStatus status;
  const uint64_t place = threadIdx.x * protocol::kVectorBytes;
  Vector s[1];
  receive_sum<protocol::Float32, 2, 1>(p, status, p.group.block + place, p.group.slot_bytes, 1, kNone, {{}}, s, [] {});
  ptx::store(p.group.multicast + place, s[0]);
}

}  // namespace mnnvl_ar::kernels
