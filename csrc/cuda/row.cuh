// Rows over threads, and the sum over a row (numerics step 3).
//
// Contract
//   * A grid is clusters (y) of CTAs (x), so that a thread finds its place without a division.
//   * A cluster of CTAs holds one row at a time, one 16-byte vector a thread, groups of 32 neighbouring vectors a warp. The
//     last warp of each CTA is the steward and holds none.
//   * RowSum gives every thread of the cluster the same bits, whatever the cluster's size.
#pragma once

#include "cuda/ptx.cuh"
#include "protocol/layout.h"
#include "protocol/numerics.h"

namespace mnnvl_ar::cuda {

inline constexpr uint32_t kMaxThreads = 480;  // a CTA, steward included; leaves each 128 registers
inline constexpr uint32_t kMaxCluster = 8;
inline constexpr uint32_t kMaxGroups = 96;  // warps with rows in a cluster
static_assert(kMaxCluster * (kMaxThreads / 32 - 1) >= protocol::kMaxRowVectors / 32);

inline constexpr uint32_t kEntered = 1, kCleared = 2, kReceived = 3, kSummed = 4;  // named barriers of a CTA

__device__ __forceinline__ uint32_t cta_index() { return blockIdx.y * gridDim.x + blockIdx.x; }
__device__ __forceinline__ uint32_t grid_size() { return gridDim.x * gridDim.y; }

struct Lane {
  uint32_t warps;  // with rows, in a CTA
  uint32_t warp;
  uint32_t groups;  // in the cluster
  uint32_t group;   // of this warp, in the row
  uint32_t vector;  // of this thread, in the row; may lie behind its end
  uint32_t cluster;
  uint32_t clusters;
  bool is_steward;
};

__device__ __forceinline__ Lane this_lane() {
  Lane lane;
  lane.warps = blockDim.x / 32 - 1;
  lane.warp = threadIdx.x / 32;
  lane.groups = gridDim.x * lane.warps;
  lane.group = blockIdx.x * lane.warps + lane.warp;
  lane.vector = lane.group * 32 + threadIdx.x % 32;
  lane.cluster = blockIdx.y;
  lane.clusters = gridDim.y;
  lane.is_steward = lane.warp == lane.warps;
  return lane;
}

// Sums of the groups of kRows rows, gathered in every CTA of the cluster. Two sets take turns: a warp that is one round ahead
// has had the sums of every warp of this CTA, so each of those has done with the round before.
template <int kRows>
struct RowSum {
  alignas(16) float group[2][kRows][kMaxGroups];
  uint64_t mbarrier[2];

  // By all threads of the CTA, before a synchronisation of the cluster. Where there is a group only its warp writes.
  __device__ __forceinline__ void init(const Lane& lane) {
    for (uint32_t i = threadIdx.x; i < 2 * kRows * kMaxGroups; i += blockDim.x) {
      if (i % kMaxGroups >= lane.groups) (&group[0][0][0])[i] = 0.0f;
    }
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(ptx::shared_address(&mbarrier[0]), 1);
      ptx::mbarrier_init(ptx::shared_address(&mbarrier[1]), 1);
    }
  }

  // Each thread's part of each row in, each row's sum out. `round` counts the calls of this cluster.
  __device__ __forceinline__ void reduce(const Lane& lane, uint32_t round, float (&sum)[kRows]) {
    const uint32_t turn = round % 2;
    const bool alone = gridDim.x == 1;
    if (!alone && threadIdx.x == 0) expect(lane, turn);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
      for (float& value : sum) value = protocol::add(value, __shfl_xor_sync(0xffffffffu, value, step));
    }
    if (alone) {
      gather_in_cta(lane, turn, sum);
    } else {
      gather_in_cluster(lane, turn, round / 2 % 2, sum);
    }
#pragma unroll
    for (float& value : sum) value = 0.0f;
#pragma unroll 1
    for (uint32_t first = 0; first < lane.groups; first += kAtOnce) add_groups(turn, first, sum);
  }

 private:
  // Loaded together, so that one latency is paid and not one a load. Groups that are not there are +0, which changes no sum.
  static constexpr uint32_t kAtOnce = kRows == 1 ? 32 : kRows == 2 ? 16 : 8;
  static_assert(kMaxGroups % kAtOnce == 0);

  __device__ __forceinline__ void add_groups(uint32_t turn, uint32_t first, float (&sum)[kRows]) const {
    float4 four[kRows][kAtOnce / 4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kAtOnce / 4; ++j) {
        four[i][j] = *reinterpret_cast<const float4*>(&group[turn][i][first + 4 * j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce / 4; ++j) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        for (float value : {four[i][j].x, four[i][j].y, four[i][j].z, four[i][j].w}) {
          sum[i] = protocol::add(sum[i], value);
        }
      }
    }
  }

  __device__ __forceinline__ void expect(const Lane& lane, uint32_t turn) {
    ptx::mbarrier_arrive_expect(ptx::shared_address(&mbarrier[turn]), lane.groups * kRows * 4);
  }

  __device__ __forceinline__ void gather_in_cluster(const Lane& lane, uint32_t turn, uint32_t parity,
                                                    const float (&sum)[kRows]) {
    const uint32_t bar = ptx::shared_address(&mbarrier[turn]), peer = threadIdx.x % 32;
    if (peer < gridDim.x) {
      const uint32_t remote = ptx::map_shared(ptx::shared_address(&group[turn][0][lane.group]), peer);
      const uint32_t remote_bar = ptx::map_shared(bar, peer);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        ptx::store_async(remote + i * sizeof(group[turn][0]), protocol::as_bits(sum[i]), remote_bar);
      }
    }
    ptx::mbarrier_wait_cluster(bar, parity);
  }

  // A cluster of one is launched like no cluster at all, and there a store to the cluster's window may find "cluster target
  // block not present" (seen on H200 in captured calls; docs/decisions.md). Nor is there anybody to send to.
  __device__ __forceinline__ void gather_in_cta(const Lane& lane, uint32_t turn, const float (&sum)[kRows]) {
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) group[turn][i][lane.group] = sum[i];
    }
    ptx::barrier_sync(kSummed, lane.warps * 32);
  }
};

}  // namespace mnnvl_ar::cuda
