#include "cuda/launch.h"

#include <algorithm>
#include <mutex>
#include <span>
#include <unordered_map>

#include "cuda/kernels.h"
#include "cuda/row.cuh"

namespace mnnvl_ar::cuda {

using protocol::Dtype;
using protocol::Op;
using protocol::Strategy;

const void* kernel(Strategy strategy, Op op, Dtype dtype, unsigned ranks, unsigned at_once) {
  switch (dtype) {
    case Dtype::bfloat16: return bfloat16_kernel(strategy, op, ranks, at_once);
    case Dtype::float16: return float16_kernel(strategy, op, ranks, at_once);
    case Dtype::float32: return float32_kernel(strategy, op, ranks, at_once);
  }
  return nullptr;
}

cudaError_t load_kernels(unsigned ranks) {
  for (Strategy strategy : {Strategy::one_shot, Strategy::two_shot}) {
    for (Op op : {Op::all_reduce, Op::all_reduce_rms_norm}) {
      for (Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32}) {
        for (unsigned at_once : {0u, 1u, 2u, 3u, 4u}) {
          cudaFuncAttributes attributes;  // asking for them loads the kernel, which a capture could not
          const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel(strategy, op, dtype, ranks, at_once));
          if (error != cudaSuccess) return error;
        }
      }
    }
  }
  return cudaSuccess;
}

namespace {

uint32_t divide_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// A kernel on one device in one shape. plan() lets one thread at a time in.
struct Fit {
  CUfunction function;
  uint32_t resident;  // clusters that the device holds at once
};

cudaError_t fit(const void* kernel, uint32_t cluster, uint32_t threads, int device, Fit* result) {
  static std::unordered_map<uint64_t, Fit> known;
  const uint64_t key = reinterpret_cast<uint64_t>(kernel) << 20 ^ uint64_t(device) << 16 ^ cluster << 12 ^ threads;
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

// How a kernel goes over rows: those that a cluster takes together, and the columns of each that a thread holds.
struct Way {
  uint32_t at_once;  // which kernel: kernels.h
  uint32_t rows;
  uint32_t columns;
  bool queues = false;  // takes any number of rows
  uint32_t threads = kMaxThreads;
};

constexpr Way kQueue{0, 1, 1, true}, kQueueOfTwoColumns{3, 1, 2, true, kTwoColumnThreads};
constexpr Way kOneShot[] = {{1, 1, 1}, kQueue}, kOneShotOfTwo[] = {{1, 1, 1}, {2, 1, 2}, kQueue, kQueueOfTwoColumns};
constexpr Way kTwoShot[] = {{1, 1, 1}, {2, 2, 1}, {4, 4, 1, true}};

// In order of preference.
std::span<const Way> ways_of(Strategy strategy, uint32_t ranks) {
  if (strategy == Strategy::two_shot) return kTwoShot;
  return ranks == 2 ? std::span<const Way>(kOneShotOfTwo) : kOneShot;
}

using Launch = CUresult (*)(const CUlaunchConfig*, CUfunction, void**, void**);

Launch driver_launch() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuLaunchKernelEx", &entry, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Launch>(entry) : nullptr;
}

// All that a plan depends on.
struct Request {
  Strategy strategy;
  Op op;
  Dtype dtype;
  int device;
  uint32_t ranks, tokens, vectors;
  Tuning tuning;

  bool operator==(const Request&) const = default;
};

struct Hash {
  size_t operator()(const Request& r) const {
    size_t hash = 0;
    for (uint32_t value :
         {uint32_t(r.strategy), uint32_t(r.op), uint32_t(r.dtype), uint32_t(r.device), r.ranks, r.tokens, r.vectors,
          r.tuning.cluster, r.tuning.max_ctas, r.tuning.batch, r.tuning.lag, r.tuning.sharers}) {
      hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

cudaError_t plan_anew(const Request& request, Plan* result) {
  const auto& [strategy, op, dtype, device, ranks, tokens, vectors, tuning] = request;
  int generation = 0, processors = 0;
  cudaError_t unknown = cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device);
  if (unknown == cudaSuccess) unknown = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (unknown != cudaSuccess) return unknown;
  const Pace pace = pace_of({ranks, tokens, vectors}, generation < 10 ? kHopper : kBlackwell);
  // All rows at once if there is room: first a row over fewer CTAs, then more of it a thread. Or else they queue up: for as many
  // clusters as there can be, and where those would be fewer than there are SMs, in the way that has most.
  const Way batch{tuning.batch >= 4 ? 4u : std::min(tuning.batch, 2u), tuning.batch, 1, true};
  uint32_t queues = 0;
  const bool is_set = strategy == Strategy::two_shot && tuning.batch != 0;
  for (const Way& way : is_set ? std::span(&batch, 1) : ways_of(strategy, ranks)) {
    const uint32_t slots = divide_up(vectors, way.columns * kGroupVectors);  // warps that a row needs
    const uint32_t narrowest = divide_up(slots, way.threads / 32 - kOtherWarps);
    const uint32_t widest =
        std::max(narrowest, std::min({tuning.cluster != 0 ? tuning.cluster : kMaxCluster, kMaxCluster, slots}));
    const uint32_t last = tuning.cluster != 0 ? widest : narrowest;
    for (uint32_t cluster = widest; cluster >= last; --cluster) {
      const uint32_t warps = divide_up(slots, cluster);
      const uint32_t needed = std::max(divide_up(slots, warps), narrowest);  // CTAs: not one more than the warps need
      const uint32_t threads = (warps + kOtherWarps) * 32;
      Fit shape_fit{};
      const cudaError_t error =
          fit(kernel(strategy, op, dtype, ranks, way.at_once), needed, threads, device, &shape_fit);
      if (error != cudaSuccess) return error;
      uint32_t room = shape_fit.resident / std::max(1u, tuning.sharers);
      if (tuning.max_ctas != 0) room = std::min(room, tuning.max_ctas / needed);
      const bool has_room = room > 0;  // or else this cluster is more than our share: a narrower one may not be
      room = std::max(1u, std::min(room, protocol::kMaxGrid / needed));
      const uint32_t wanted = divide_up(tokens, way.rows);
      const bool fits = has_room && wanted <= room;
      if (!fits && (!way.queues || cluster != last || queues >= uint32_t(processors) || queues >= room)) continue;
      queues = room;
      *result = Plan{.function = shape_fit.function,
                     .cluster = needed,
                     .clusters = std::min(wanted, room),
                     .threads = threads,
                     .batch = way.rows,
                     .lag = std::max(1u, tuning.lag),
                     .pace = pace};
      if (fits) return cudaSuccess;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t plan(Strategy strategy, Op op, Dtype dtype, protocol::Shape shape, const Tuning& tuning, int device,
                 Plan* result) {
  static std::mutex mutex;
  static std::unordered_map<Request, Plan, Hash> known;
  const Request request{strategy, op, dtype, device, shape.ranks, shape.tokens, shape.vectors, tuning};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(request);
  if (found != known.end()) {
    *result = found->second;
    return cudaSuccess;
  }
  const cudaError_t error = plan_anew(request, result);
  if (error == cudaSuccess) known.emplace(request, *result);
  return error;
}

CUresult launch(const Plan& plan, protocol::Pdl pdl, protocol::Params& params, CUstream stream) {
  static const Launch launch_kernel = driver_launch();
  if (launch_kernel == nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  params.batch = plan.batch;
  params.lag = plan.lag;
  params.row_clocks = plan.pace.row;
  params.first_look_clocks = plan.pace.first_look;
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
