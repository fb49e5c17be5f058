#if MNNVL_AR_CUDA
#include "launch/processors.h"

#include "launch/device.h"

namespace mnnvl_ar::launch {

uint32_t processors_of(CUstream stream) {
  static const auto green_of = driver_function<CUresult (*)(CUstream, CUgreenCtx*)>("cuStreamGetGreenCtx", 12040);
  static const auto resource_of =
      driver_function<CUresult (*)(CUgreenCtx, CUdevResource*, CUdevResourceType)>("cuGreenCtxGetDevResource", 12040);
  if (green_of == nullptr || resource_of == nullptr) return 0;
  CUgreenCtx green = nullptr;
  if (green_of(stream, &green) != CUDA_SUCCESS || green == nullptr) return 0;
  CUdevResource resource{};
  if (resource_of(green, &resource, CU_DEV_RESOURCE_TYPE_SM) != CUDA_SUCCESS) return 0;
  return resource.sm.smCount;
}

}  // namespace mnnvl_ar::launch
#endif
