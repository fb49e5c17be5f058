#include "torch/run.h"

#include <unistd.h>

#include <algorithm>

#include "host/one_rank.h"

#if MNNVL_AR_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "cuda/launch.h"
#include "torch/graphs.h"

// Defined in libtorch_cuda only: null under a CPU-only PyTorch, where no CUDA tensor can reach us.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace mnnvl_ar {

namespace {

class OneAtATime {
 public:
  explicit OneAtATime(Workspace& workspace) : busy_(workspace.busy) {
    STD_TORCH_CHECK(!busy_.exchange(true) || protocol::is_off(workspace.params, protocol::Rule::one_thread),
                    "workspace: another thread is in a call on it; one call at a time");
  }
  ~OneAtATime() { busy_ = false; }

 private:
  std::atomic<bool>& busy_;
};

#if MNNVL_AR_CUDA
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

void launch(Workspace& workspace, protocol::Op op, const Agreement& a, const Pick& pick, int64_t pdl,
            protocol::Shape shape, protocol::Params& params) {
  const auto device = static_cast<int>(a.device);
  const OnDevice guard(device);
  const LaunchShape& l = pick.launch;
  const cuda::Tuning tuning{l.cluster, l.max_ctas, l.batch, l.lag,
                            workspace.settings.concurrent ? sharers(a.device) : 1};
  // A next kernel that is launched early holds processors while it waits for us. Beside another workspace, whose call may
  // need them before ours can end on some peer, that could wait for ever.
  if (tuning.sharers > 1) pdl = std::min<int64_t>(pdl, static_cast<int64_t>(protocol::Pdl::late));
  cuda::Plan plan;
  cudaError_t error = cuda::plan(pick.strategy, op, a.dtype, shape, tuning, device, &plan);
  STD_TORCH_CHECK(error == cudaSuccess, "mnnvl_ar: no launch shape: ", cudaGetErrorString(error));
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "mnnvl_ar: this PyTorch has no CUDA streams");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  note_capture(workspace, static_cast<cudaStream_t>(stream));
  const CUresult result = cuda::launch(plan, static_cast<protocol::Pdl>(pdl), params, static_cast<CUstream>(stream));
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "mnnvl_ar: launch failed: CUresult ", static_cast<int>(result));
}
#endif

// Test builds: between a call's first look at the workspace and its second.
void loiter([[maybe_unused]] const protocol::Params& params, [[maybe_unused]] int64_t device) {
#ifdef MNNVL_AR_TEST_BUILD
  if (device < 0 && params.sabotage.delay_seed != 0) usleep(params.sabotage.delay_ns / 1000);
#endif
}

[[noreturn]] void refuse(Workspace& workspace, int64_t handle, const char* what) {
  const Finding finding = explain(workspace);
  STD_TORCH_CHECK(false, "workspace: handle ", handle, " ", what, " (fault code ", finding.code,
                  "): ", text_of(finding), " Workspace.check() raises this; Workspace.recover(), or make a new one.");
  __builtin_unreachable();
}

}  // namespace

void run(int64_t handle, protocol::Op op, const Agreement& a, const Choice& choice, const protocol::Params& call) {
  Workspace& workspace = find(handle, a.device);
  check_choice(choice.strategy, kAuto, 1, "strategy", "-1 (auto), 0 (one-shot) or 1 (two-shot)");
  check_choice(choice.pdl, kAuto, 2, "pdl", "-1 (the workspace's), 0 (off), 1 (late) or 2 (early)");
  protocol::Params params = workspace.params;
  const protocol::Shape shape{params.ranks, a.shape.tokens, a.shape.vectors};
  const Pick pick = choose(workspace, choice.strategy, shape);
  if (shape.tokens == 0 && !protocol::is_off(params, protocol::Rule::zero_tokens)) return;
  const uint32_t code = static_cast<volatile protocol::FaultRecord*>(params.record)->code;
  if (code != 0 || workspace.found.load(std::memory_order_relaxed)) [[unlikely]]
    refuse(workspace, handle, "is broken");
  loiter(params, a.device);
  const OneAtATime only(workspace);
  if (!protocol::is_off(params, protocol::Rule::still_open))
    check_open(workspace, handle);  // as find() did, but now it lasts

  params.x = call.x;
  params.residual = call.residual;
  params.weight = call.weight;
  params.out = call.out;
  params.residual_out = call.residual_out;
  params.eps = call.eps;
  params.weight_bias = call.weight_bias;
  params.weight_is_fp32 = call.weight_is_fp32;
  params.tokens = shape.tokens;
  params.vectors = shape.vectors;
  params.description = protocol::describe(op, a.dtype, pick.strategy, shape.vectors);
  params.launch = workspace.launches++;
#ifdef MNNVL_AR_TEST_BUILD
  params.sabotage.frozen_epoch = workspace.host_calls++;
#endif
  if (a.device < 0) {
    if (!host::run(params, op, a.dtype, pick.strategy)) refuse(workspace, handle, "broke in this call");
    return;
  }
#if MNNVL_AR_CUDA
  launch(workspace, op, a, pick, choice.pdl == kAuto ? workspace.settings.pdl : choice.pdl, shape, params);
#else
  STD_TORCH_CHECK(false, "x: is on a GPU, but this build has no CUDA transport (there was no nvcc)");
#endif
}

}  // namespace mnnvl_ar
