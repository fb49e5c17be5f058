#if MNNVL_AR_CUDA
#include "launch/plan.h"

#include <algorithm>
#include <mutex>
#include <span>
#include <unordered_map>

#include "launch/hints.h"
#include "launch/limits.h"
#include "launch/processors.h"

namespace mnnvl_ar::launch {

using protocol::LaunchShape;
using protocol::Strategy;

namespace {

constexpr uint32_t divide_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// A kernel on one device in one shape. plan() lets one thread at a time in.
struct Fit {
  CUfunction function;
  uint32_t resident;  // clusters that the device holds at once
};

cudaError_t fit(const void* kernel, uint32_t cluster, uint32_t threads, int device, Fit* result) {
  static auto& known = *new std::unordered_map<uint64_t, Fit>;  // never destroyed: a thread may be here at exit
  const uint64_t key = reinterpret_cast<uint64_t>(kernel) << 20 ^ uint64_t(device) << 16 ^ cluster << 12 ^ threads;
  const auto found = known.find(key);
  if (found != known.end()) {
    *result = found->second;
    return cudaSuccess;
  }
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(threads);
  config.attrs = attributes;
  config.numAttrs = 1;
#if CUDART_VERSION >= 13000
  if (spreads_link_traffic(device)) {
    attributes[config.numAttrs].id = cudaLaunchAttributeNvlinkUtilCentricScheduling;
    attributes[config.numAttrs++].val.nvlinkUtilCentricScheduling = 1;
  }
#endif
  int count = 0;
  cudaError_t error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  if (error != cudaSuccess && config.numAttrs == 2) {
    do_without_hint(device);
    cudaGetLastError();  // or it would be found by whoever asks next
    config.numAttrs = 1;
    error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  }
  cudaFunction_t function = nullptr;
  if (error == cudaSuccess) error = cudaGetFuncBySymbol(&function, kernel);
  if (error != cudaSuccess) return error;
  *result = known[key] = Fit{function, static_cast<uint32_t>(count)};
  return cudaSuccess;
}

// A way to go over rows.
struct Way {
  Form form;
  uint32_t rows;         // that a cluster takes together
  uint32_t columns = 1;  // of each row, that a thread holds
  bool queues = false;   // takes any number of rows
  uint32_t threads = kMaxThreads;
};

// In order of preference: a cluster a row if there is room, first a row over fewer CTAs, then more of it a thread; or else rows
// queue up.
constexpr Way kOneShot[] = {{Form::row, 1}, {Form::queue, 1, 1, true}};
constexpr Way kOneShotOfFour[] = {{.form = Form::row, .rows = 1, .threads = kRowThreads}, {Form::queue, 1, 1, true}};
constexpr Way kOneShotOfTwo[] = {{.form = Form::row, .rows = 1, .threads = kRowThreads},
                                 {Form::row_two_columns, 1, 2},
                                 {Form::queue, 1, 1, true},
                                 {Form::queue_two_columns, 1, 2, true, kTwoColumnThreads}};
constexpr Way kTwoShot[] = {{Form::batch_of_1, 1}, {Form::batch_of_2, 2}, {Form::batch_of_4, 4, 1, true}};

std::span<const Way> ways_of(Strategy strategy, uint32_t ranks) {
  if (strategy == Strategy::two_shot) return kTwoShot;
  if (ranks <= 2) return kOneShotOfTwo;
  return ranks == 4 ? std::span<const Way>(kOneShotOfFour) : kOneShot;
}

// Where four rows at a time are not built, the same batch goes by two.
Form built_form(Form form, uint32_t ranks, uint32_t generation) {
  return is_built(form, ranks, generation) ? form : Form::batch_of_2;
}

struct Hash {
  size_t operator()(const Request& r) const {
    size_t hash = 0;
    for (uint32_t value : {uint32_t(r.op), uint32_t(r.dtype), uint32_t(r.strategy), r.ranks, r.tokens, r.vectors,
                           r.shape.cluster, r.shape.max_ctas, r.shape.batch, r.shape.lag, r.sharers, r.processors,
                           uint32_t(r.device), r.link.hop_clocks}) {
      hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

cudaError_t plan_anew(const Request& request, Plan* result) {
  const uint32_t ranks = request.ranks, tokens = request.tokens, vectors = request.vectors;
  const LaunchShape& wanted_shape = request.shape;
  int generation = 0, processors = 0;
  cudaError_t unknown = cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, request.device);
  if (unknown == cudaSuccess) {
    unknown = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, request.device);
  }
  if (unknown != cudaSuccess) return unknown;
  const protocol::Pace pace = pace_of({ranks, tokens, vectors}, request.link);
  const epilogues::Listed* const epilogue = epilogues::find(request.op);
  if (epilogue == nullptr) return cudaErrorInvalidDeviceFunction;

  const uint32_t batch = wanted_shape.batch;
  const Way by_batch{batch >= 4 ? Form::batch_of_4 : batch >= 2 ? Form::batch_of_2 : Form::batch_of_1, batch, 1, true};
  const bool is_set = request.strategy == Strategy::two_shot && batch != 0;
  // Rows that queue up take as many clusters as there can be, and where those would be fewer than there are SMs, the way that has
  // most of them.
  uint32_t queues = 0;
  for (const Way& way : is_set ? std::span(&by_batch, 1) : ways_of(request.strategy, ranks)) {
    const Form form = built_form(way.form, ranks, static_cast<uint32_t>(generation));
    const void* const kernel = epilogue->kernel(request.dtype, ranks, form);
    if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    const uint32_t slots = divide_up(vectors, way.columns * kGroupVectors);  // warps that a row needs
    const uint32_t narrowest = divide_up(slots, way.threads / 32 - kOtherWarps);
    const uint32_t most = wanted_shape.cluster != 0 ? wanted_shape.cluster : kMaxCluster;
    const uint32_t widest = std::max(narrowest, std::min({most, kMaxCluster, slots}));
    const uint32_t last = wanted_shape.cluster != 0 ? widest : narrowest;
    for (uint32_t cluster = widest; cluster >= last; --cluster) {
      const uint32_t warps = divide_up(slots, cluster);
      const uint32_t needed = std::max(divide_up(slots, warps), narrowest);  // CTAs: not one more than the warps need
      const uint32_t threads = (warps + kOtherWarps) * 32;
      Fit shape_fit{};
      const cudaError_t error = fit(kernel, needed, threads, request.device, &shape_fit);
      if (error != cudaSuccess) return error;
      const uint32_t resident = resident_on(shape_fit.resident, request.processors, uint32_t(processors));
      uint32_t room = resident / std::max(1u, request.sharers);
      if (wanted_shape.max_ctas != 0) room = std::min(room, wanted_shape.max_ctas / needed);
      const bool has_room = room > 0;  // or else this cluster is more than our share: a narrower one may not be
      room = std::max(1u, std::min(room, protocol::kMaxGrid / needed));
      const uint32_t wanted = divide_up(tokens, way.rows);
      const bool fits = has_room && wanted <= room;
      if (!fits && (!way.queues || cluster != last || queues >= uint32_t(processors) || queues >= room)) continue;
      queues = room;
      const uint32_t clusters = std::min(wanted, room);
      *result = Plan{.function = shape_fit.function,
                     .launch = {.shape = {.cluster = needed,
                                          .max_ctas = needed * clusters,
                                          .batch = way.rows,
                                          .lag = std::max(1u, wanted_shape.lag)},
                                .clusters = clusters,
                                .threads = threads,
                                .pace = pace,
                                .number = 0,
                                .trigger_early = 0,
                                .programmatic = 0}};
      if (fits) return cudaSuccess;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t plan(const Request& request, Plan* result) {
  static std::mutex mutex;
  static auto& known = *new std::unordered_map<Request, Plan, Hash>;
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

}  // namespace mnnvl_ar::launch
#endif
