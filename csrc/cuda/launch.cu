#include "cuda/launch.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "cuda/kernels.h"
#include "cuda/row.cuh"

namespace mnnvl_ar::cuda {

using protocol::Dtype;
using protocol::Op;
using protocol::Strategy;

const void* kernel(Strategy strategy, Op op, Dtype dtype, unsigned ranks, unsigned rows) {
  switch (dtype) {
    case Dtype::bfloat16: return bfloat16_kernel(strategy, op, ranks, rows);
    case Dtype::float16: return float16_kernel(strategy, op, ranks, rows);
    case Dtype::float32: return float32_kernel(strategy, op, ranks, rows);
  }
  return nullptr;
}

cudaError_t load_kernels(unsigned ranks) {
  for (Strategy strategy : {Strategy::one_shot, Strategy::two_shot}) {
    for (Op op : {Op::all_reduce, Op::all_reduce_rms_norm}) {
      for (Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32}) {
        for (unsigned rows : {1u, 2u, 4u}) {
          cudaFuncAttributes attributes;  // asking for them loads the kernel, which a capture could not
          const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel(strategy, op, dtype, ranks, rows));
          if (error != cudaSuccess) return error;
        }
      }
    }
  }
  return cudaSuccess;
}

namespace {

uint32_t divide_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// A kernel on one device in one shape.
struct Fit {
  CUfunction function;
  uint32_t resident;  // clusters that the device holds at once
};

cudaError_t fit(const void* kernel, uint32_t cluster, uint32_t threads, int device, Fit* result) {
  static std::mutex mutex;
  static std::unordered_map<uint64_t, Fit> known;
  const uint64_t key = reinterpret_cast<uint64_t>(kernel) << 20 ^ uint64_t(device) << 16 ^ cluster << 12 ^ threads;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) {
    *result = found->second;
    return cudaSuccess;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(threads);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  cudaError_t error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  cudaFunction_t function = nullptr;
  if (error == cudaSuccess) error = cudaGetFuncBySymbol(&function, kernel);
  if (error != cudaSuccess) return error;
  *result = known[key] = Fit{function, static_cast<uint32_t>(count)};
  return cudaSuccess;
}

using Launch = CUresult (*)(const CUlaunchConfig*, CUfunction, void**, void**);

Launch driver_launch() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuLaunchKernelEx", &entry, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Launch>(entry) : nullptr;
}

}  // namespace

cudaError_t plan(Strategy strategy, Op op, Dtype dtype, protocol::Shape shape, const Tuning& tuning, int device,
                 Plan* result) {
  const uint32_t groups = divide_up(shape.vectors, 32);
  const uint32_t most_warps = kMaxThreads / 32 - kOtherWarps;
  const uint32_t narrowest = divide_up(groups, most_warps);
  const uint32_t largest_batch = strategy == Strategy::one_shot ? 1 : 4;
  const uint32_t widest = std::min({tuning.cluster != 0 ? tuning.cluster : kMaxCluster, kMaxCluster, groups});

  // All rows at once if there is room: first a row over fewer CTAs, then more rows a cluster.
  for (uint32_t batch = 1;; batch *= 2) {
    for (uint32_t cluster = std::max(widest, narrowest); cluster >= narrowest; --cluster) {
      const uint32_t warps = divide_up(groups, cluster);
      const uint32_t needed = std::max(divide_up(groups, warps), narrowest);  // CTAs: not one more than the warps need
      result->threads = (warps + kOtherWarps) * 32;
      result->cluster = needed;
      result->batch = tuning.batch != 0 && strategy == Strategy::two_shot ? tuning.batch : batch;
      const uint32_t at_once = result->batch >= 4 ? 4 : result->batch >= 2 ? 2 : 1;
      Fit shape_fit{};
      const cudaError_t error =
          fit(kernel(strategy, op, dtype, shape.ranks, at_once), needed, result->threads, device, &shape_fit);
      if (error != cudaSuccess) return error;
      result->function = shape_fit.function;
      uint32_t room = std::max(1u, shape_fit.resident / std::max(1u, tuning.sharers));
      if (tuning.max_ctas != 0) room = std::min(room, std::max(1u, tuning.max_ctas / needed));
      const uint32_t wanted = divide_up(shape.tokens, result->batch);
      result->clusters = std::min({wanted, room, protocol::kMaxGrid / needed});
      result->lag = std::max(1u, tuning.lag);
      const bool is_last = cluster == narrowest && (batch == largest_batch || tuning.batch != 0);
      if (is_last || (shape_fit.resident > 0 && (wanted <= room || tuning.cluster != 0))) return cudaSuccess;
    }
  }
}

CUresult launch(const Plan& plan, protocol::Pdl pdl, protocol::Params& params, CUstream stream) {
  static const Launch launch_kernel = driver_launch();
  if (launch_kernel == nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  params.batch = plan.batch;
  params.lag = plan.lag;
  params.cluster = plan.cluster;
  params.clusters = plan.clusters;
  params.threads = plan.threads;
  params.trigger_early = pdl == protocol::Pdl::early;
  CUlaunchAttribute attributes[2]{};
  attributes[0].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  attributes[0].value.clusterDim = {plan.cluster, 1, 1};
  attributes[1].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attributes[1].value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config{};
  config.gridDimX = plan.cluster;
  config.gridDimY = plan.clusters;
  config.gridDimZ = 1;
  config.blockDimX = plan.threads;
  config.blockDimY = config.blockDimZ = 1;
  config.hStream = stream;
  config.attrs = attributes;
  config.numAttrs = pdl == protocol::Pdl::off ? 1 : 2;
  void* arguments[] = {&params};
  return launch_kernel(&config, plan.function, arguments, nullptr);
}

}  // namespace mnnvl_ar::cuda
