#if MNNVL_AR_CUDA
#include <initializer_list>

#include "launch/plan.h"

namespace mnnvl_ar::launch {

using protocol::Dtype;

cudaError_t load_kernels(uint32_t ranks) {
  int device = 0, generation = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error != cudaSuccess) return error;
  for (const epilogues::Listed& epilogue : epilogues::kEpilogues) {
    for (Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32}) {
      for (Form form : kForms) {
        if (!is_built(form, ranks, static_cast<uint32_t>(generation))) continue;
        const void* const kernel = epilogue.kernel(dtype, ranks, form);
        if (kernel == nullptr) continue;  // an epilogue that does not take that dtype
        cudaFuncAttributes attributes;    // asking for them loads the kernel, which a capture could not
        error = cudaFuncGetAttributes(&attributes, kernel);
        if (error != cudaSuccess) return error;
      }
    }
  }
  return cudaSuccess;
}

namespace {

using LaunchKernel = CUresult (*)(const CUlaunchConfig*, CUfunction, void**, void**);

LaunchKernel find_launch_kernel() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuLaunchKernelEx", &entry, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<LaunchKernel>(entry) : nullptr;
}

}  // namespace

CUresult launch(CUfunction function, const protocol::Launch& launch, void* call, CUstream stream) {
  static const LaunchKernel launch_kernel = find_launch_kernel();
  if (launch_kernel == nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  CUlaunchAttribute attributes[2]{};
  attributes[0].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  attributes[0].value.clusterDim = {launch.shape.cluster, 1, 1};
  attributes[1].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attributes[1].value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config{};
  config.gridDimX = launch.shape.cluster;
  config.gridDimY = launch.clusters;
  config.gridDimZ = 1;
  config.blockDimX = launch.threads;
  config.blockDimY = config.blockDimZ = 1;
  config.hStream = stream;
  config.attrs = attributes;
  config.numAttrs = launch.programmatic ? 2 : 1;
  void* arguments[] = {call};
  return launch_kernel(&config, function, arguments, nullptr);
}

}  // namespace mnnvl_ar::launch
#endif
