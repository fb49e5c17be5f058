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

const void* kernel(Strategy strategy, Op op, Dtype dtype, unsigned ranks) {
  switch (dtype) {
    case Dtype::bfloat16: return bfloat16_kernel(strategy, op, ranks);
    case Dtype::float16: return float16_kernel(strategy, op, ranks);
    case Dtype::float32: return float32_kernel(strategy, op, ranks);
  }
  return nullptr;
}

cudaError_t load_kernels(unsigned ranks) {
  for (Strategy strategy : {Strategy::one_shot, Strategy::two_shot}) {
    for (Op op : {Op::all_reduce, Op::all_reduce_rms_norm}) {
      for (Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32}) {
        cudaFuncAttributes attributes;  // asking for them loads the kernel, which a capture could not
        const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel(strategy, op, dtype, ranks));
        if (error != cudaSuccess) return error;
      }
    }
  }
  return cudaSuccess;
}

namespace {

uint32_t divide_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

struct Config {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config;

  Config(uint32_t clusters, uint32_t cluster, uint32_t threads, bool pdl, cudaStream_t stream) : attributes{}, config{} {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {cluster, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(clusters * cluster);
    config.blockDim = dim3(threads);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = pdl ? 2 : 1;
  }
};

// Clusters of this shape that one device holds at once.
cudaError_t resident_clusters(const void* kernel, uint32_t cluster, uint32_t threads, int device, uint32_t* clusters) {
  static std::mutex mutex;
  static std::unordered_map<uint64_t, uint32_t> known;
  const uint64_t key = reinterpret_cast<uint64_t>(kernel) << 20 ^ uint64_t(device) << 16 ^ cluster << 12 ^ threads;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) {
    *clusters = found->second;
    return cudaSuccess;
  }
  Config config(1, cluster, threads, false, nullptr);
  int count = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, kernel, &config.config);
  if (error != cudaSuccess) return error;
  *clusters = known[key] = static_cast<uint32_t>(count);
  return cudaSuccess;
}

}  // namespace

cudaError_t plan(Strategy strategy, Op op, Dtype dtype, protocol::Shape shape, const Tuning& tuning, int device,
                 Plan* result) {
  const uint32_t groups = divide_up(shape.vectors, 32);
  const uint32_t most_warps = kMaxThreads / 32 - 1;
  const uint32_t narrowest = divide_up(groups, most_warps);
  result->kernel = kernel(strategy, op, dtype, shape.ranks);
  result->batch = strategy == Strategy::one_shot ? 1 : std::max(1u, tuning.batch);
  result->lag = std::max(1u, tuning.lag);
  const uint32_t wanted = divide_up(shape.tokens, result->batch);

  // A row over as many CTAs as leave room for all rows at once, and not one CTA more than its warps need.
  uint32_t cluster = std::min({tuning.cluster != 0 ? tuning.cluster : kMaxCluster, kMaxCluster, groups});
  for (cluster = std::max(cluster, narrowest);; --cluster) {
    const uint32_t warps = divide_up(groups, cluster);
    const uint32_t needed = std::max(divide_up(groups, warps), narrowest);
    result->threads = (warps + 1) * 32;
    uint32_t resident = 0;
    const cudaError_t error = resident_clusters(result->kernel, needed, result->threads, device, &resident);
    if (error != cudaSuccess) return error;
    if (resident == 0 && cluster > narrowest) continue;
    uint32_t room = std::max(1u, resident / 2);
    if (tuning.max_ctas != 0) room = std::min(room, std::max(1u, tuning.max_ctas / needed));
    result->cluster = needed;
    result->clusters = std::min(wanted, room);
    if (wanted <= room || tuning.cluster != 0 || cluster == narrowest) return cudaSuccess;
  }
}

cudaError_t launch(const Plan& plan, protocol::Pdl pdl, protocol::Params& params, cudaStream_t stream) {
  params.batch = plan.batch;
  params.lag = plan.lag;
  params.trigger_early = pdl == protocol::Pdl::early;
  Config config(plan.clusters, plan.cluster, plan.threads, pdl != protocol::Pdl::off, stream);
  void* arguments[] = {&params};
  return cudaLaunchKernelExC(&config.config, plan.kernel, arguments);
}

}  // namespace mnnvl_ar::cuda
