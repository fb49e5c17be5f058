// How much of a row a CTA and a cluster may hold: what kernels are built for and plans stay within.
#pragma once

#include <cstdint>

#include "protocol/layout.h"

namespace mnnvl_ar::launch {

inline constexpr uint32_t kMaxThreads = 512;  // of a CTA; leaves each 128 registers
// Where a cluster has one row, a thread one vector of it, and at most three peers' data is awaited: 64 registers do, and a CTA
// may hold a whole row, which then is reduced without an exchange between CTAs.
inline constexpr uint32_t kRowThreads = 1024;
// Where rows queue up by two columns a thread: two such CTAs an SM leave each thread 96.
inline constexpr uint32_t kTwoColumnThreads = 320;
inline constexpr uint32_t kOtherWarps = 2;  // of a CTA, without rows
inline constexpr uint32_t kMaxCluster = 8;
inline constexpr uint32_t kMaxGroups = 96;     // of a row, in a cluster
inline constexpr uint32_t kGroupVectors = 32;  // neighbouring vectors that a warp holds (numerics step 3)
static_assert(kMaxCluster * (kMaxThreads / 32 - kOtherWarps) >= protocol::kMaxRowVectors / kGroupVectors);
static_assert(kMaxCluster * (kTwoColumnThreads / 32 - kOtherWarps) * 2 >= protocol::kMaxRowVectors / kGroupVectors);

}  // namespace mnnvl_ar::launch
