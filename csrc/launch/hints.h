// What a launch tells the driver besides its shape. A hint changes neither bits nor how many CTAs a call may count on: the plan asks
// for residency with the same hints (plan.cpp).
#pragma once

#include "launch/form.h"

namespace mnnvl_ar::launch {

inline constexpr int kFirstDriverWithLinkHint =
    13000;  // CUDA 13.0; an older one refuses a launch for what it does not know

// Whether CTAs are to be spread as if each stored as much to NVLink as any other, which holds for these kernels. Blackwell only: on
// Hopper every measured figure is without it. Not measured.
constexpr bool spreads_link_traffic(int driver_version, uint32_t generation) {
  return driver_version >= kFirstDriverWithLinkHint && generation >= kBlackwell;
}

#if MNNVL_AR_CUDA
// The same, of this process's driver and a device; looked up once a device.
bool spreads_link_traffic(int device);

// From now on it does not: something refused the hint.
void do_without_hint(int device);
#endif

}  // namespace mnnvl_ar::launch
