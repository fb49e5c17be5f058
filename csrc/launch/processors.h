// How many SMs calls may count on. A device may have more than a call gets: in a green context, under MPS, or where ranks share it.
//
// Contract
//   * What ranks may count on is agreed on at bring-up (mnnvl_ar/memory/processors.py); 0 is the whole device.
//   * A grid is no larger than what so many SMs hold at once, as far as that follows from what the whole device holds.
#pragma once

#include <cstdint>

#if MNNVL_AR_CUDA
#include <cuda.h>
#endif

namespace mnnvl_ar::launch {

// Of `resident` clusters on a device of `of_device` SMs, those for which `processors` of them have room.
constexpr uint32_t resident_on(uint32_t resident, uint32_t processors, uint32_t of_device) {
  if (processors == 0 || processors >= of_device) return resident;
  return static_cast<uint32_t>(uint64_t{resident} * processors / of_device);
}

#if MNNVL_AR_CUDA
// SMs of the green context that a stream is of; 0: it is of none, or the driver does not say.
uint32_t processors_of(CUstream stream);
#endif

}  // namespace mnnvl_ar::launch
