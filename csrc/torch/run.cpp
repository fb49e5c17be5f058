#include "torch/run.h"

#include <unistd.h>

#include <algorithm>

#if MNNVL_AR_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "launch/device.h"
#include "launch/plan.h"
#include "launch/processors.h"
#include "torch/graphs.h"

// Defined in libtorch_cuda only: null under a CPU-only PyTorch, where no CUDA tensor can reach us.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace mnnvl_ar::detail {

namespace {

// Test builds: between a call's first look at the workspace and its second.
void pause_before_second_look([[maybe_unused]] const protocol::Params& params, [[maybe_unused]] int64_t device) {
#ifdef MNNVL_AR_TEST_BUILD
  if (device < 0 && params.sabotage.delay_seed != 0) usleep(params.sabotage.delay_ns / 1000);
#endif
}

[[noreturn]] void refuse(Workspace& workspace, int64_t handle, const char* what) {
  const diagnosis::Finding finding = explain(workspace);
  STD_TORCH_CHECK(false, "workspace: handle ", handle, " ", what, " (fault code ", static_cast<uint32_t>(finding.code),
                  "): ", text_of(finding), " Workspace.check() raises this; Workspace.recover(), or make a new one.");
  __builtin_unreachable();
}

void check_sound(Workspace& workspace, int64_t handle) {
  const auto code = static_cast<volatile protocol::FaultRecord*>(workspace.params.group.record)->code;
  if (code != protocol::FaultCode::none || workspace.found.load(std::memory_order_relaxed)) [[unlikely]] {
    refuse(workspace, handle, "is broken");
  }
}

// For one thread, until `release` ends.
void hold(Workspace& workspace, int64_t handle, Release& release) {
  if (workspace.busy.exchange(true) && !protocol::is_off(workspace.params, protocol::Rule::one_thread)) {
    STD_TORCH_CHECK(
        workspace.caller.load() != std::this_thread::get_id(),
        "workspace: this thread is in a call on it, which a signal's handler interrupts; one call at a time");
    STD_TORCH_CHECK(false, "workspace: another thread is in a call on it; one call at a time");
  }
  workspace.caller = std::this_thread::get_id();
  release.workspace = &workspace;
  // As find() did, but now it lasts.
  if (!protocol::is_off(workspace.params, protocol::Rule::still_open)) check_open(workspace, handle);
}

}  // namespace

Turn::Turn(int64_t handle, protocol::Op op, const Agreement& a, const Options& options)
    : handle_(handle), op_(op), agreement_(a), options_(options) {
  Workspace& workspace = find(handle, a.device);
  check_choice(options.strategy, launch::kAuto, 1, "strategy", "-1 (auto), 0 (one-shot) or 1 (two-shot)");
  check_choice(options.pdl, launch::kAuto, 2, "pdl", "-1 (the workspace's), 0 (off), 1 (late) or 2 (early)");
  check_choice(options.tag, 0, protocol::kTags - 1, "tag", "0, 1, 2 or 3");
  params_ = workspace.params;
  cut_ = cut(workspace, options.strategy, a.shape);
  if (protocol::is_off(params_, protocol::Rule::zero_tokens)) cut_.pieces.count = std::max(1u, cut_.pieces.count);
  if (cut_.pieces.count == 0) return;
  check_sound(workspace, handle);
  pause_before_second_look(params_, a.device);
  hold(workspace, handle, release_);

  workspace_ = &workspace;
  row_bytes_ = uint64_t{a.shape.vectors} * protocol::kVectorBytes;
}

bool Turn::next() {
  if (piece_ == cut_.pieces.count) return false;
  if (piece_ == 1 && protocol::is_off(params_, protocol::Rule::all_pieces)) return false;
  const protocol::Shape& shape = agreement_.shape;
  params_.tensors = {.x = nullptr,
                     .tokens = cut_.pieces.rows_of(piece_, shape.tokens),
                     .vectors = shape.vectors,
                     .first_token = cut_.pieces.first_of(piece_),
                     .call_tokens = shape.tokens,
                     .description = protocol::describe(op_, agreement_.dtype, cut_.choice.strategy, shape.vectors,
                                                       static_cast<uint32_t>(options_.tag), piece_),
                     .numbers = {}};
  params_.tensors.x = static_cast<const uint8_t*>(agreement_.x.data_ptr()) + begin();
  ++piece_;
#ifdef MNNVL_AR_TEST_BUILD
  params_.sabotage.frozen_epoch = workspace_->host_calls++;
#endif
  return true;
}

void Turn::fail() {
  STD_TORCH_CHECK(!workspace_->closed && !workspace_->asleep, "workspace: handle ", handle_,
                  ": close(force=True), wake() or recover() on this rank has ended this call; its outputs are NaN");
  refuse(*workspace_, handle_, "broke in this call");
}

namespace {

uint32_t sharing_of(const Workspace& workspace) {
  return workspace.settings.concurrent ? sharers(workspace.settings.device) : 1;
}

#if MNNVL_AR_CUDA
// The current one, if calls have the SMs there that they count on.
void* stream_for(const Workspace& workspace, int64_t handle) {
  const auto device = static_cast<int32_t>(workspace.settings.device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "mnnvl_ar: this PyTorch has no CUDA streams");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  if (workspace.settings.processors != 0) {
    const uint32_t here = launch::processors_of(static_cast<CUstream>(stream));
    STD_TORCH_CHECK(here == 0 || here >= workspace.settings.processors, "workspace: handle ", handle, " counts on ",
                    workspace.settings.processors, " SMs, and the current stream is of a green context that has ", here,
                    "; make the workspace there, on all ranks");
  }
  return stream;
}
#endif

// What each launch leaves in the workspace: its number, and the graph that captures it.
void enter(Workspace& workspace, protocol::Launch& launch, [[maybe_unused]] void* stream) {
  launch.number = workspace.launches++;
#if MNNVL_AR_CUDA
  note_capture(workspace, static_cast<cudaStream_t>(stream));
#endif
}

}  // namespace

void Turn::set_edges(protocol::Launch& launch, uint32_t sharing) const {
  const int64_t asked = options_.pdl == launch::kAuto ? workspace_->settings.pdl : options_.pdl;
  auto pdl = asked == launch::kAuto ? cut_.choice.pdl : static_cast<protocol::Pdl>(asked);
  // A next kernel that is launched early holds processors while it waits for us. Beside another workspace, whose call may
  // need them before ours can end on some peer, that could wait for ever.
  if (sharing > 1) pdl = std::min(pdl, protocol::Pdl::late);
  // Between pieces the next kernel is ours, and waits for this one: only an "off" that was asked for is against that.
  const bool is_first = piece_ == 1, is_last = piece_ == cut_.pieces.count;
  const bool may_follow_early = asked != static_cast<int64_t>(protocol::Pdl::off);
  launch.trigger_early = is_last ? pdl == protocol::Pdl::early : may_follow_early && sharing == 1;
  launch.programmatic = is_first ? pdl != protocol::Pdl::off : may_follow_early;
}

Room Turn::announce(protocol::Params& params) {
  const uint32_t sharing = sharing_of(*workspace_);
  set_edges(params.launch, sharing);
  void* stream = nullptr;
#if MNNVL_AR_CUDA
  if (agreement_.device >= 0) stream = stream_for(*workspace_, handle_);
#endif
  enter(*workspace_, params.launch, stream);
  return {sharing, workspace_->settings.processors, cut_.choice.shape.max_ctas};
}

#if MNNVL_AR_CUDA
namespace {

void launch_on(void* stream, Workspace& workspace, CUfunction function, void* call, protocol::Params& params) {
  enter(workspace, params.launch, stream);
  const auto device = static_cast<int>(workspace.settings.device);
  const CUresult result = launch::launch(function, params.launch, device, call, static_cast<CUstream>(stream));
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "mnnvl_ar: launch failed: CUresult ", static_cast<int>(result));
}

}  // namespace

void Turn::launch(void* call, size_t size, protocol::Params& params) {
  Workspace& workspace = *workspace_;
  const auto device = static_cast<int>(agreement_.device);
  const launch::OnDevice guard(device);
  STD_TORCH_CHECK(guard.ok(), "mnnvl_ar: cuda:", device, " cannot be used by this thread");
  const uint32_t sharing = sharing_of(workspace);
  void* const stream = stream_for(workspace, handle_);
  launch::Plan plan;
  const cudaError_t error = launch::plan({.op = op_,
                                          .dtype = agreement_.dtype,
                                          .strategy = cut_.choice.strategy,
                                          .ranks = params.group.ranks,
                                          .tokens = params.tensors.tokens,
                                          .vectors = params.tensors.vectors,
                                          .shape = cut_.choice.shape,
                                          .sharers = sharing,
                                          .processors = workspace.settings.processors,
                                          .device = device,
                                          .link = workspace.settings.link},
                                         &plan);
  STD_TORCH_CHECK(error == cudaSuccess, "mnnvl_ar: no launch shape: ", cudaGetErrorString(error));
  params.launch = plan.launch;
  set_edges(params.launch, sharing);
  if (BoundCall* const bound = binding()) {
    const auto* const first = static_cast<const std::byte*>(call);
    const auto params_at = static_cast<size_t>(reinterpret_cast<const std::byte*>(&params) - first);
    *bound = {handle_, agreement_.device, sharing, workspace.settings.processors, std::move(bound->launches)};
    bound->launches.push_back({plan.function, {first, first + size}, params_at});
    return;
  }
  launch_on(stream, workspace, plan.function, call, params);
}

bool launch_bound(BoundCall& call) {
  Workspace& workspace = find(call.workspace, call.device);
  if (sharing_of(workspace) != call.sharing || workspace.settings.processors != call.processors) return false;
  check_sound(workspace, call.workspace);
  Release release;
  hold(workspace, call.workspace, release);
  const auto device = static_cast<int>(call.device);
  const launch::OnDevice guard(device);
  STD_TORCH_CHECK(guard.ok(), "mnnvl_ar: cuda:", device, " cannot be used by this thread");
  void* const stream = stream_for(workspace, call.workspace);
  for (BoundLaunch& launch : call.launches) {
    launch_on(stream, workspace, static_cast<CUfunction>(launch.function), launch.call.data(), launch.params());
  }
  return true;
}
#else
void Turn::launch(void*, size_t, protocol::Params&) {
  STD_TORCH_CHECK(false, "x: is on a GPU, but this build has no CUDA transport (there was no nvcc)");
}

bool launch_bound(BoundCall&) { return false; }  // nothing was bound
#endif

}  // namespace mnnvl_ar::detail
