// One-line wrappers over the PTX this library is made of. Memory order and scope are in the name; kernels hold no asm.
#pragma once

#include <cstdint>

#include "protocol/sentinel.h"

namespace mnnvl_ar::ptx {

using protocol::Vector;

// ---- data on the link -------------------------------------------------------------------------------------------

__device__ __forceinline__ Vector load_relaxed_sys(const void* address) {
  Vector v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(address));
  return v;
}

// As two words of 64 bits, each of which is there or not: a wider access is several of its parts, in any order.
__device__ __forceinline__ Vector load_halves_relaxed_sys(const void* address) {
  Vector v;
  asm volatile(
      "{\n\t.reg .b64 low, high;\n\tld.relaxed.sys.global.v2.b64 {low, high}, [%4];\n\t"
      "mov.b64 {%0, %1}, low;\n\tmov.b64 {%2, %3}, high;\n\t}"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "l"(address));
  return v;
}

__device__ __forceinline__ void store_halves_relaxed_sys(void* address, const Vector& v) {
  asm volatile(
      "{\n\t.reg .b64 low, high;\n\tmov.b64 low, {%1, %2};\n\tmov.b64 high, {%3, %4};\n\t"
      "st.relaxed.sys.global.v2.b64 [%0], {low, high};\n\t}" ::"l"(address),
      "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
      : "memory");
}

__device__ __forceinline__ uint32_t load_relaxed_sys_u32(const void* address) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
}

__device__ __forceinline__ void store_relaxed_sys(void* address, const Vector& v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

// The vector form exists for .f32 only; it moves bits, nothing is computed.
__device__ __forceinline__ void multimem_store_relaxed_sys(void* address, const Vector& v) {
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

__device__ __forceinline__ void store_relaxed_sys_u32(void* address, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// ---- a call's own tensors: ordered by kernel boundaries ------------------------------------------------------------

// Not .nc: outputs may alias inputs, and the weight may have been written by the predecessor, which .nc may not see.
__device__ __forceinline__ Vector load(const void* address) {
  Vector v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(address));
  return v;
}

// Only if `wanted`; else v stays. In the registers of v, so that nothing is copied, and so awaited, where two ways meet.
__device__ __forceinline__ void load_if(bool wanted, const void* address, Vector& v) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %5, 0;\n\t"
      "@wanted ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(v.word[0]), "+r"(v.word[1]), "+r"(v.word[2]), "+r"(v.word[3])
      : "l"(address), "r"(static_cast<uint32_t>(wanted)));
}

__device__ __forceinline__ void store(void* address, const Vector& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

// ---- control words ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ Vector load_relaxed_gpu(const void* address) {
  Vector v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(address)
               : "memory");
  return v;
}

// As `load_if`.
__device__ __forceinline__ void load_relaxed_gpu_if(bool wanted, const void* address, Vector& v) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %5, 0;\n\t"
      "@wanted ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(v.word[0]), "+r"(v.word[1]), "+r"(v.word[2]), "+r"(v.word[3])
      : "l"(address), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

__device__ __forceinline__ uint32_t atomic_add_relaxed_gpu(void* address, uint32_t value) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}

__device__ __forceinline__ void reduce_add_relaxed_gpu(void* address, uint32_t value) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// One more; after `last` comes 0.
__device__ __forceinline__ void reduce_inc_relaxed_gpu(void* address, uint32_t last) {
  asm volatile("red.relaxed.gpu.global.inc.u32 [%0], %1;" ::"l"(address), "r"(last) : "memory");
}

__device__ __forceinline__ uint32_t atomic_cas_relaxed_sys(void* address, uint32_t expected, uint32_t value) {
  uint32_t before;
  asm volatile("atom.relaxed.sys.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(before)
               : "l"(address), "r"(expected), "r"(value)
               : "memory");
  return before;
}

// What depends on the returned value happens after the exchange. A caller that drops it does not wait.
__device__ __forceinline__ Vector exchange_relaxed_gpu(void* address, const Vector& v) {
  Vector before;
  asm volatile(
      "{\n\t.reg .b128 fresh, stale;\n\t.reg .b64 low, high;\n\t"
      "mov.b64 low, {%5, %6};\n\tmov.b64 high, {%7, %8};\n\tmov.b128 fresh, {low, high};\n\t"
      "atom.relaxed.gpu.global.exch.b128 stale, [%4], fresh;\n\t"
      "mov.b128 {low, high}, stale;\n\tmov.b64 {%0, %1}, low;\n\tmov.b64 {%2, %3}, high;\n\t}"
      : "=r"(before.word[0]), "=r"(before.word[1]), "=r"(before.word[2]), "=r"(before.word[3])
      : "l"(address), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
      : "memory");
  return before;
}

__device__ __forceinline__ void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// Between accesses to one memory by two addresses. What comes of it: a fence of all scopes, and an L1 without a line.
__device__ __forceinline__ void fence_proxy_alias() { asm volatile("fence.proxy.alias;" ::: "memory"); }
__device__ __forceinline__ void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// ---- launch ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void trigger_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ uint64_t global_timer_ns() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

__device__ __forceinline__ uint32_t clock() {
  uint32_t clocks;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(clocks) : : "memory");
  return clocks;
}

// The same value. What a thread can compute anew ptxas computes anew where it is used: the special registers that addresses are
// made of, 30 cycles each, behind what all have waited for. The result of a shuffle it keeps. By whole warps.
__device__ __forceinline__ uint32_t keep(uint32_t value) { return __shfl_sync(0xffffffffu, value, threadIdx.x % 32); }

__device__ __forceinline__ uint64_t keep(uint64_t value) {
  return uint64_t{keep(static_cast<uint32_t>(value >> 32))} << 32 | keep(static_cast<uint32_t>(value));
}

// Within some 2^-23 of the truth, for what is neither subnormal nor negative.
__device__ __forceinline__ float reciprocal_root_approximate(float value) {
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
}

// What is computed from the vector from here on is not computed earlier.
__device__ __forceinline__ void not_before(Vector& v) {
  asm volatile("" : "+r"(v.word[0]), "+r"(v.word[1]), "+r"(v.word[2]), "+r"(v.word[3]));
}

// ---- a CTA's named barriers, for a part of its warps -------------------------------------------------------------------

__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_sync(uint32_t barrier, uint32_t threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- clusters ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Orders nothing that came before it, for the other CTAs, but what a fence did. By whole warps; not every warp that arrives has to
// wait.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, const Vector& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ Vector load_shared_vector(uint32_t address) {
  Vector v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
// The address, in the cluster's shared window, of what lies at `address` in this CTA, for CTA `rank`.
__device__ __forceinline__ uint32_t map_shared(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
// Stores one word into a CTA of the cluster and counts its four bytes on that CTA's mbarrier.
__device__ __forceinline__ void store_async(uint32_t address, uint32_t value, uint32_t mbarrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address), "r"(value),
               "r"(mbarrier)
               : "memory");
}

__device__ __forceinline__ void mbarrier_init(uint32_t mbarrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t mbarrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t mbarrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes)
               : "memory");
}
// Whether it has completed, without waiting; if so, as mbarrier_wait_cta.
__device__ __forceinline__ bool mbarrier_test_cta(uint32_t mbarrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n\t.reg .pred done;\n\tmbarrier.test_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, done;\n\t}"
      : "=r"(done)
      : "r"(mbarrier), "r"(parity)
      : "memory");
  return done != 0;
}
// For what this CTA's threads did before they arrived.
__device__ __forceinline__ void mbarrier_wait_cta(uint32_t mbarrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\tmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n\t}" ::"r"(
          mbarrier),
      "r"(parity)
      : "memory");
}
// The same for all threads of the cluster.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t mbarrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n\t}" ::
          "r"(mbarrier),
      "r"(parity)
      : "memory");
}

}  // namespace mnnvl_ar::ptx
