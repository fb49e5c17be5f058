// Rows over threads, and the sum over a row (numerics step 3).
//
// Contract
//   * A grid is clusters (y) of CTAs (x), so that a thread finds its place without a division.
//   * A cluster of CTAs holds one row at a time. A warp holds kColumns neighbouring groups of 32 neighbouring 16-byte vectors,
//     a thread one vector of each (its columns). The last two warps of each CTA, the steward and the usher (call.cuh), hold
//     none.
//   * RowSum gives every thread of the cluster the same bits, whatever the cluster's size.
#pragma once

#include "cuda/ptx.cuh"
#include "protocol/layout.h"
#include "protocol/numerics.h"

namespace mnnvl_ar::cuda {

inline constexpr uint32_t kMaxThreads = 512;  // of a CTA; leaves each 128 registers
inline constexpr uint32_t kTwoColumnThreads =
    320;                                    // where rows queue up by two columns a thread: two such CTAs leave each 96
inline constexpr uint32_t kOtherWarps = 2;  // without rows
inline constexpr uint32_t kMaxCluster = 8;
inline constexpr uint32_t kMaxGroups = 96;  // of a row, in a cluster
inline constexpr uint32_t kGroupVectors = 32, kGroupBytes = kGroupVectors * protocol::kVectorBytes;
static_assert(kMaxCluster * (kMaxThreads / 32 - kOtherWarps) >= protocol::kMaxRowVectors / 32);

inline constexpr uint32_t kEntered = 1, kCleared = 2, kReceived = 3, kSummed = 4;  // named barriers of a CTA

__device__ __forceinline__ uint32_t cta_index() { return blockIdx.y * gridDim.x + blockIdx.x; }
__device__ __forceinline__ uint32_t grid_size() { return gridDim.x * gridDim.y; }

enum class Role : uint32_t { row, steward, usher };

struct Lane {
  uint32_t warps;  // with rows, in a CTA
  uint32_t warp;
  uint32_t groups;  // in the cluster
  uint32_t vector;  // of this thread, in the row: its first column. May lie behind the row's end
  uint32_t cluster;
  uint32_t clusters;
  Role role;
};

template <int kColumns>
__device__ __forceinline__ Lane this_lane() {
  Lane lane;
  lane.warps = blockDim.x / 32 - kOtherWarps;
  lane.warp = threadIdx.x / 32;
  lane.groups = gridDim.x * lane.warps * kColumns;
  lane.vector = ptx::keep((blockIdx.x * lane.warps + lane.warp) * (kColumns * kGroupVectors) + threadIdx.x % 32);
  lane.cluster = blockIdx.y;
  lane.clusters = gridDim.y;
  lane.role = lane.warp < lane.warps ? Role::row : lane.warp == lane.warps ? Role::steward : Role::usher;
  return lane;
}

// What a thread works on at once: kColumns of each of kRows rows. kOnce: and nothing else in the call.
template <int kRows_, int kColumns_ = 1, bool kOnce_ = false>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kVectors = kRows * kColumns;
  static constexpr bool kOnce = kOnce_;
};

// Sums of the groups of kRows rows, gathered in every CTA of the cluster. Two sets take turns: a warp that is one round ahead
// has had the sums of every warp of this CTA, so each of those has done with the round before.
template <class Tile>
struct RowSum {
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;
  alignas(16) float group[2][kRows][kMaxGroups];
  uint64_t mbarrier[2];

  // By all threads of the CTA, before a synchronisation of the cluster. Where there is a group only its warp writes.
  __device__ __forceinline__ void init(const Lane& lane) {
    for (uint32_t i = threadIdx.x; i < 2 * kRows * kMaxGroups; i += blockDim.x) {
      if (i % kMaxGroups >= lane.groups) {
        (&group[0][0][0])[i] = 0.0f;
      }
    }
    if (threadIdx.x == 0) {
      for (uint32_t turn : {0, 1}) {
        const uint32_t bar = ptx::shared_address(&mbarrier[turn]);
        ptx::mbarrier_init(bar, 1);
        if (gridDim.x > 1) expect(lane, bar);
      }
    }
  }

  // Each thread's part of each row in, by rows and columns. Once this is over, the sums of all groups lie here. `round` counts the
  // sums of this cluster; `here` is this object's address, kept.
  static __device__ __forceinline__ void gather(const Lane& lane, uint32_t here, uint32_t round,
                                                float (&sum)[Tile::kVectors]) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
      for (float& value : sum) value = protocol::add(value, __shfl_xor_sync(0xffffffffu, value, step));
    }
    if (gridDim.x == 1) {
      gather_in_cta(lane, here + turn_offset(round), sum);
    } else {
      gather_in_cluster(lane, here, round, sum);
    }
  }

  // After gather(), any time before the next one but one.
  static __device__ __forceinline__ void prepare_next(const Lane& lane, uint32_t here, uint32_t round) {
    if (!Tile::kOnce && gridDim.x > 1 && threadIdx.x == 0) expect(lane, here + mbarrier_offset(round));
  }

  // Each row's sum, after gather().
  static __device__ __forceinline__ void add_up(const Lane& lane, uint32_t here, uint32_t round, float (&sum)[kRows]) {
    const uint32_t groups = here + turn_offset(round);
    float part[kRows][protocol::kSums] = {};
#pragma unroll 1
    for (uint32_t first = 0; first < lane.groups; first += kAtOnce) {
      if (kRows > 1 || lane.groups - first > kAtOnce / 2) {
        add_groups<kAtOnce>(groups + first * 4, part);
      } else {
        add_groups<kAtOnce / 2>(groups + first * 4, part);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) sum[i] = protocol::total(part[i]);
  }

 private:
  // Loaded together, so that one latency is paid and not one a load; of one row, half of them where those are all. Groups that
  // are not there are +0, which changes no sum.
  static constexpr uint32_t kAtOnce = kRows == 1 ? 32 : kRows == 2 ? 16 : 8;
  static_assert(kMaxGroups % kAtOnce == 0);
  static constexpr uint32_t kRowBytes = kMaxGroups * 4;

  static __device__ __forceinline__ uint32_t place(int i) { return i / kColumns * kRowBytes + i % kColumns * 4; }
  static __device__ __forceinline__ uint32_t turn_offset(uint32_t round) { return round % 2 * (kRows * kRowBytes); }
  static __device__ __forceinline__ uint32_t mbarrier_offset(uint32_t round) {
    return 2 * kRows * kRowBytes + round % 2 * 8;
  }

  static __device__ __forceinline__ void expect(const Lane& lane, uint32_t bar) {
    ptx::mbarrier_arrive_expect(bar, lane.groups * kRows * 4);
  }

  template <uint32_t kCount>
  static __device__ __forceinline__ void add_groups(uint32_t first, float (&part)[kRows][protocol::kSums]) {
    float4 four[kRows][kCount / 4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) four[i][j] = ptx::load_shared_float4(first + i * kRowBytes + j * 16);
    }
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float value[] = {four[i][j].x, four[i][j].y, four[i][j].z, four[i][j].w};
#pragma unroll
        for (int k = 0; k < protocol::kSums; ++k) part[i][k] = protocol::add(part[i][k], value[k]);
      }
    }
  }

  static __device__ __forceinline__ void gather_in_cluster(const Lane& lane, uint32_t here, uint32_t round,
                                                           const float (&sum)[Tile::kVectors]) {
    const uint32_t peer = lane.vector % 32, bar = here + mbarrier_offset(round);
    if (peer < gridDim.x) {
      const uint32_t remote = ptx::map_shared(here + turn_offset(round) + lane.vector / 32 * 4, peer);
      const uint32_t remote_bar = ptx::map_shared(bar, peer);
#pragma unroll
      for (int i = 0; i < Tile::kVectors; ++i) {
        ptx::store_async(remote + place(i), protocol::as_bits(sum[i]), remote_bar);
      }
    }
    ptx::mbarrier_wait_cluster(bar, round / 2 % 2);
  }

  // A cluster of one is launched like no cluster at all, and there a store to the cluster's window may find "cluster target
  // block not present" (seen on H200 in captured calls; docs/decisions.md). Nor is there anybody to send to.
  static __device__ __forceinline__ void gather_in_cta(const Lane& lane, uint32_t groups,
                                                       const float (&sum)[Tile::kVectors]) {
    if (lane.vector % 32 == 0) {
#pragma unroll
      for (int i = 0; i < Tile::kVectors; ++i) {
        ptx::store_shared(groups + place(i) + lane.vector / 32 * 4, protocol::as_bits(sum[i]));
      }
    }
    ptx::barrier_sync(kSummed, lane.warps * 32);
  }
};

}  // namespace mnnvl_ar::cuda
