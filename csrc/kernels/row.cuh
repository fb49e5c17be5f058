// How rows are spread over threads.
//
// Contract
//   * A grid is clusters (y) of CTAs (x), so that a thread finds its place without a division.
//   * A cluster of CTAs holds one row at a time. A warp holds kColumns neighbouring groups of 32 neighbouring 16-byte vectors,
//     a thread one vector of each (its columns).
//   * The last two warps of each CTA hold no rows: the exit warp (exit_warp.cuh) and the entry warp (entry_warp.cuh).
#pragma once

#include "kernels/ptx.cuh"
#include "launch/limits.h"
#include "protocol/params.h"

namespace mnnvl_ar::kernels {

using launch::kGroupVectors, launch::kMaxCluster, launch::kMaxGroups, launch::kMaxThreads, launch::kOtherWarps,
    launch::kRowThreads, launch::kTwoColumnThreads;

inline constexpr uint32_t kGroupBytes = kGroupVectors * protocol::kVectorBytes;

// Named barriers of a CTA: the position in the ring is known; the stale slot is cleared; all awaited data has been loaded; the
// words of an exchange inside one CTA are stored.
inline constexpr uint32_t kEntered = 1, kCleared = 2, kReceived = 3, kExchanged = 4;

__device__ __forceinline__ uint32_t cta_index() { return blockIdx.y * gridDim.x + blockIdx.x; }
__device__ __forceinline__ uint32_t grid_size() { return gridDim.x * gridDim.y; }

enum class Role : uint32_t { row, exit, entry };

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
  lane.role = lane.warp < lane.warps ? Role::row : lane.warp == lane.warps ? Role::exit : Role::entry;
  return lane;
}

// What a thread works on at once: kColumns vectors of each of kRows rows. kOnce: and of nothing else in the launch.
template <int kRows_, int kColumns_ = 1, bool kOnce_ = false>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kVectors = kRows * kColumns;
  static constexpr bool kOnce = kOnce_;
};

// In bytes, in a tensor of x's size: 32 bits, since what fits a slot is smaller than 4 GiB (protocol::kMaxSlotBytes).
__device__ __forceinline__ uint32_t vector_offset(const protocol::Params& p, uint32_t row, uint32_t vector) {
  return (row * p.tensors.vectors + vector) * protocol::kVectorBytes;
}

// Whether that column of the thread lies in the row.
__device__ __forceinline__ bool holds_column(const protocol::Params& p, const Lane& lane, int column) {
  return lane.vector + column * kGroupVectors < p.tensors.vectors;
}

// What is loaded under a condition holds, where that is not met, what it held before: by the loops around it that takes registers all
// along. Whoever has none to spare begins anew.
template <int kCount>
__device__ __forceinline__ void forget(protocol::Vector (&v)[kCount]) {
#pragma unroll
  for (protocol::Vector& vector : v) vector = protocol::Vector{};
}

// `count` of kRows rows, from `first` on; the others are not there.
struct Rows {
  uint32_t first;
  uint32_t count;
};

}  // namespace mnnvl_ar::kernels
