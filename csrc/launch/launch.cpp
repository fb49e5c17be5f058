#if MNNVL_AR_CUDA
#include <array>
#include <atomic>
#include <initializer_list>

#include "launch/device.h"
#include "launch/hints.h"
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

enum Answer : uint8_t { unknown, no, yes };

// By number of the device. Devices beyond do without the hint.
std::array<std::atomic<Answer>, 64> spreads{};

}  // namespace

bool spreads_link_traffic(int device) {
  if (device < 0 || static_cast<size_t>(device) >= spreads.size()) return false;
  std::atomic<Answer>& answer = spreads[static_cast<size_t>(device)];
  if (answer.load(std::memory_order_relaxed) == unknown) {
    int driver = 0, generation = 0;
    const bool is_told = cudaDriverGetVersion(&driver) == cudaSuccess &&
                         cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess;
    answer = is_told && spreads_link_traffic(driver, static_cast<uint32_t>(generation)) ? yes : no;
  }
  return answer.load(std::memory_order_relaxed) == yes;
}

void do_without_hint(int device) { spreads[static_cast<size_t>(device)] = no; }

CUresult launch(CUfunction function, const protocol::Launch& launch, int device, void* call, CUstream stream) {
  static const LaunchKernel launch_kernel = driver_function<LaunchKernel>("cuLaunchKernelEx", 12000);
  if (launch_kernel == nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  CUlaunchAttribute attributes[3]{};
  attributes[0].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  attributes[0].value.clusterDim = {launch.shape.cluster, 1, 1};
  unsigned int count = 1;
  if (launch.programmatic) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attributes[count++].value.programmaticStreamSerializationAllowed = 1;
  }
  bool is_hinted = false;
#if CUDA_VERSION >= 13000
  is_hinted = spreads_link_traffic(device);
  if (is_hinted) {  // the last one, so that it can be left out
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_NVLINK_UTIL_CENTRIC_SCHEDULING;
    attributes[count++].value.nvlinkUtilCentricScheduling = 1;
  }
#endif
  CUlaunchConfig config{};
  config.gridDimX = launch.shape.cluster;
  config.gridDimY = launch.clusters;
  config.gridDimZ = 1;
  config.blockDimX = launch.threads;
  config.blockDimY = config.blockDimZ = 1;
  config.hStream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  void* arguments[] = {call};
  CUresult result = launch_kernel(&config, function, arguments, nullptr);
  if (is_hinted && (result == CUDA_ERROR_INVALID_VALUE || result == CUDA_ERROR_NOT_SUPPORTED)) {
    do_without_hint(device);
    --config.numAttrs;
    result = launch_kernel(&config, function, arguments, nullptr);
  }
  return result;
}

}  // namespace mnnvl_ar::launch
#endif
