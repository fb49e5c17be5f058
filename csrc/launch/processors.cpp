#if MNNVL_AR_CUDA
#include "launch/processors.h"

#include <cuda_runtime_api.h>

namespace mnnvl_ar::launch {

namespace {

template <class Function>
Function find(const char* name) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, 12040, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(entry) : nullptr;
}

}  // namespace

uint32_t processors_of(CUstream stream) {
  static const auto green_of = find<CUresult (*)(CUstream, CUgreenCtx*)>("cuStreamGetGreenCtx");
  static const auto resource_of =
      find<CUresult (*)(CUgreenCtx, CUdevResource*, CUdevResourceType)>("cuGreenCtxGetDevResource");
  if (green_of == nullptr || resource_of == nullptr) return 0;
  CUgreenCtx green = nullptr;
  if (green_of(stream, &green) != CUDA_SUCCESS || green == nullptr) return 0;
  CUdevResource resource{};
  if (resource_of(green, &resource, CU_DEV_RESOURCE_TYPE_SM) != CUDA_SUCCESS) return 0;
  return resource.sm.smCount;
}

}  // namespace mnnvl_ar::launch
#endif
