// torch.ops.mnnvl_ar.*: schemas and registration, on LibTorch's stable ABI. Public names and docstrings are in mnnvl_ar/ops.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/notes.h"
#include "torch/run.h"

namespace mnnvl_ar {
namespace {

Tensor empty_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int32_t dtype = 0, device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

Span span_of_rows(const Agreement& a, const Tensor& tensor, const char* name) {
  const uintptr_t bytes = uintptr_t{a.shape.tokens} * a.shape.vectors * protocol::kVectorBytes;
  return {reinterpret_cast<uintptr_t>(tensor.data_ptr()), bytes, name};
}

Span span_of_weight(const Agreement& a, const Tensor& weight, bool is_fp32) {
  const uintptr_t bytes = is_fp32 ? a.hidden * 4 : a.shape.vectors * protocol::kVectorBytes;
  return {reinterpret_cast<uintptr_t>(weight.data_ptr()), bytes, "weight"};
}

void all_reduce_into(const Agreement& a, Tensor& out, int64_t workspace, const Choice& choice) {
  protocol::Params params{};
  params.x = a.x.data_ptr();
  params.out = out.data_ptr();
  run(workspace, protocol::Op::all_reduce, a, choice, params);
}

Tensor all_reduce(Tensor x, int64_t workspace, int64_t strategy, int64_t pdl) {
  const Agreement a = check_input(x);
  Tensor out = empty_like(x);
  all_reduce_into(a, out, workspace, {strategy, pdl});
  return out;
}

void all_reduce_out(Tensor x, Tensor out, int64_t workspace, int64_t strategy, int64_t pdl) {
  const Agreement a = check_input(x);
  check_alike(a, out, "out");
  check_apart(span_of_rows(a, out, "out"), span_of_rows(a, x, "x"), Sharing::all_or_nothing);
  all_reduce_into(a, out, workspace, {strategy, pdl});
}

void all_reduce_rms_norm_into(const Agreement& a, const Tensor& residual, const Tensor& weight, bool weight_is_fp32,
                              double eps, Tensor& norm_out, Tensor& residual_out, int64_t workspace, double weight_bias,
                              const Choice& choice) {
  protocol::Params params{};
  params.weight_is_fp32 = weight_is_fp32;
  params.x = a.x.data_ptr();
  params.residual = residual.data_ptr();
  params.weight = weight.data_ptr();
  params.out = norm_out.data_ptr();
  params.residual_out = residual_out.data_ptr();
  params.eps = static_cast<float>(eps);
  params.weight_bias = static_cast<float>(weight_bias);
  run(workspace, protocol::Op::all_reduce_rms_norm, a, choice, params);
}

std::tuple<Tensor, Tensor> all_reduce_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps, int64_t workspace,
                                               double weight_bias, int64_t strategy, int64_t pdl) {
  const Agreement a = check_input(x);
  check_alike(a, residual, "residual");
  const bool is_fp32 = check_weight(a, weight);
  Tensor norm_out = empty_like(x), residual_out = empty_like(x);
  all_reduce_rms_norm_into(a, residual, weight, is_fp32, eps, norm_out, residual_out, workspace, weight_bias,
                           {strategy, pdl});
  return {norm_out, residual_out};
}

void all_reduce_rms_norm_out(Tensor x, Tensor residual, Tensor weight, double eps, Tensor norm_out, Tensor residual_out,
                             int64_t workspace, double weight_bias, int64_t strategy, int64_t pdl) {
  const Agreement a = check_input(x);
  check_alike(a, residual, "residual");
  check_alike(a, norm_out, "norm_out");
  check_alike(a, residual_out, "residual_out");
  const bool is_fp32 = check_weight(a, weight);
  const Span norm = span_of_rows(a, norm_out, "norm_out"), after = span_of_rows(a, residual_out, "residual_out");
  check_apart(norm, after, Sharing::nothing);
  for (const Span& out : {norm, after}) {
    check_apart(out, span_of_rows(a, x, "x"), Sharing::all_or_nothing);
    check_apart(out, span_of_rows(a, residual, "residual"), Sharing::all_or_nothing);
    check_apart(out, span_of_weight(a, weight, is_fp32), Sharing::nothing);
  }
  all_reduce_rms_norm_into(a, residual, weight, is_fp32, eps, norm_out, residual_out, workspace, weight_bias,
                           {strategy, pdl});
}

// ---- for mnnvl_ar.Workspace ------------------------------------------------------------------------------------------

int64_t workspace_create(std::vector<int64_t> s, std::vector<int64_t> blocks, int64_t multicast,
                         std::vector<int64_t> table) {
  STD_TORCH_CHECK(s.size() == 11, "workspace: ", s.size(), " settings, wanted 11");
  return create({s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10]}, blocks, multicast, Table(table));
}

bool workspace_close(int64_t handle, bool force) { return close(handle, force); }

void workspace_sleep(int64_t handle, bool end) { put_to_sleep(handle, end); }

protocol::Shape shape_of(int64_t ranks, int64_t tokens, int64_t row_bytes) {
  return {static_cast<uint32_t>(ranks), static_cast<uint32_t>(tokens),
          static_cast<uint32_t>(row_bytes / protocol::kVectorBytes)};
}

bool workspace_fits(int64_t handle, int64_t tokens, int64_t row_bytes) {
  const Workspace& w = find_any(handle);
  return tokens >= 0 && tokens <= INT32_MAX && is_row(row_bytes) &&
         fits(w, shape_of(w.params.ranks, tokens, row_bytes));
}

void check_row(int64_t row_bytes) {
  STD_TORCH_CHECK(is_row(row_bytes), "hidden: rows of ", row_bytes, " bytes, wanted a multiple of 16 bytes up to ",
                  protocol::kMaxRowVectors * protocol::kVectorBytes);
}

// How a call would run: strategy, cluster, max_ctas, batch, lag; 0 of the last four is left to the launch.
std::vector<int64_t> workspace_choice(int64_t handle, int64_t tokens, int64_t row_bytes, int64_t strategy) {
  const Workspace& w = find_any(handle);
  check_row(row_bytes);
  STD_TORCH_CHECK(tokens >= 0 && tokens <= INT32_MAX, "tokens: is ", tokens, ", wanted 0 to ", INT32_MAX);
  const Pick pick = choose(w, strategy, shape_of(w.params.ranks, tokens, row_bytes));
  const LaunchShape& l = pick.launch;
  return {static_cast<int64_t>(pick.strategy), l.cluster, l.max_ctas, l.batch, l.lag};
}

int64_t workspace_slot_bytes(int64_t ranks, int64_t tokens, int64_t row_bytes, int64_t strategy,
                             std::vector<int64_t> table) {
  check_row(row_bytes);
  STD_TORCH_CHECK(tokens >= 1 && tokens <= INT32_MAX, "max_tokens: is ", tokens, ", wanted 1 to ", INT32_MAX);
  STD_TORCH_CHECK(ranks >= 1 && ranks <= protocol::kMaxRanks, "group: has ", ranks, " ranks, wanted 1 to ",
                  protocol::kMaxRanks);
  const uint64_t vectors = needed_vectors(strategy, shape_of(ranks, tokens, row_bytes), Table(table));
  STD_TORCH_CHECK(vectors < protocol::kMaxSlotBytes / protocol::kVectorBytes, "max_tokens: is ", tokens,
                  ", which needs ", vectors, " vectors of 16 bytes a slot, wanted fewer than 4 GiB");
  return static_cast<int64_t>(vectors * protocol::kVectorBytes);
}

// Offsets and words that the block must be filled with: see mnnvl_ar/workspace.py.
std::vector<int64_t> block_layout(int64_t slot_bytes) {
  return {static_cast<int64_t>(protocol::block_bytes(static_cast<uint64_t>(slot_bytes))),
          static_cast<int64_t>(protocol::kControlBytes),
          static_cast<int64_t>(protocol::kBoardOffset),
          static_cast<int64_t>(protocol::kBoardBytes),
          static_cast<int64_t>(protocol::kProbeOffset),
          protocol::kSentinel,
          protocol::kNoEpoch,
          protocol::kMaxRanks};
}

// Areas that nobody writes: the canary, then offset and size of each.
std::vector<int64_t> block_canaries() {
  std::vector<int64_t> found{protocol::kCanary};
  for (const Area& area : kCanaries) {
    found.push_back(static_cast<int64_t>(area.offset));
    found.push_back(static_cast<int64_t>(area.bytes));
  }
  return found;
}

// code, told, rank, peer (-1: not known), epoch, waited_ns, when_ns, offset.
std::vector<int64_t> numbers_of(const Finding& f) {
  return {f.code,
          f.told,
          f.rank,
          f.peer < protocol::kMaxRanks ? int64_t{f.peer} : -1,
          f.call.epoch == protocol::kNoEpoch ? -1 : int64_t{f.call.epoch},
          static_cast<int64_t>(f.waited_ns),
          f.when_ns,
          static_cast<int64_t>(f.offset)};
}

// What is wrong with the workspace, in numbers; the first is 0 if nothing is.
std::vector<int64_t> workspace_fault(int64_t handle) { return numbers_of(poll(find_any(handle))); }

// The same, and its message, the call that waited and the peer's, a line each; of one look, since recover() may come in between
// two.
std::tuple<std::vector<int64_t>, std::string> workspace_explain(int64_t handle) {
  const Finding f = explain(find_any(handle));
  return {numbers_of(f), text_of(f) + "\n" + name_of_call(f.call) + "\n" + name_of_call(f.peer_call)};
}

void workspace_reset(int64_t handle) { reset(handle); }

#ifdef MNNVL_AR_TEST_BUILD
void sabotage(int64_t handle, int64_t broken, int64_t frozen_dirty, int64_t delay_seed, int64_t delay_ns) {
  find_any(handle).params.sabotage = {static_cast<uint32_t>(broken), 0, static_cast<uint32_t>(frozen_dirty),
                                      static_cast<uint32_t>(delay_seed), static_cast<uint32_t>(delay_ns)};
}
#endif

}  // namespace
}  // namespace mnnvl_ar

#define MNNVL_AR_CHOICE ", *, int strategy=-1, int pdl=-1"

STABLE_TORCH_LIBRARY(mnnvl_ar, m) {
  m.def("all_reduce(Tensor x, int workspace" MNNVL_AR_CHOICE ") -> Tensor");
  m.def("all_reduce_out(Tensor x, Tensor(a!) out, int workspace" MNNVL_AR_CHOICE ") -> ()");
  m.def(
      "all_reduce_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, int workspace, *, float "
      "weight_bias=0.0, "
      "int strategy=-1, int pdl=-1) -> (Tensor, Tensor)");
  m.def(
      "all_reduce_rms_norm_out(Tensor x, Tensor residual, Tensor weight, float eps, Tensor(a!) norm_out, "
      "Tensor(b!) residual_out, int workspace, *, float weight_bias=0.0, int strategy=-1, int pdl=-1) -> ()");
  m.def("_workspace_create(int[] settings, int[] blocks, int multicast, int[] table) -> int");
  m.def("_workspace_close(int workspace, bool force=False) -> bool");
  m.def("_workspace_sleep(int workspace, bool end) -> ()");
  m.def("_workspace_fits(int workspace, int tokens, int row_bytes) -> bool");
  m.def("_workspace_choice(int workspace, int tokens, int row_bytes, int strategy=-1) -> int[]");
  m.def("_workspace_slot_bytes(int ranks, int tokens, int row_bytes, int strategy, int[] table) -> int");
  m.def("_workspace_fault(int workspace) -> int[]");
  m.def("_workspace_explain(int workspace) -> (int[], str)");
  m.def("_workspace_reset(int workspace) -> ()");
  m.def("_block_layout(int slot_bytes) -> int[]");
  m.def("_block_canaries() -> int[]");
#ifdef MNNVL_AR_TEST_BUILD
  m.def("_sabotage(int workspace, int broken, int frozen_dirty, int delay_seed, int delay_ns) -> ()");
#endif
}

#undef MNNVL_AR_CHOICE

#define MNNVL_AR_REGISTER(m)                                                \
  m.impl("all_reduce", TORCH_BOX(&mnnvl_ar::all_reduce));                   \
  m.impl("all_reduce_out", TORCH_BOX(&mnnvl_ar::all_reduce_out));           \
  m.impl("all_reduce_rms_norm", TORCH_BOX(&mnnvl_ar::all_reduce_rms_norm)); \
  m.impl("all_reduce_rms_norm_out", TORCH_BOX(&mnnvl_ar::all_reduce_rms_norm_out));

STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CPU, m){MNNVL_AR_REGISTER(m)} STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CUDA,
                                                                                            m){MNNVL_AR_REGISTER(m)}
#undef MNNVL_AR_REGISTER

STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CompositeExplicitAutograd, m) {
  m.impl("_workspace_create", TORCH_BOX(&mnnvl_ar::workspace_create));
  m.impl("_workspace_close", TORCH_BOX(&mnnvl_ar::workspace_close));
  m.impl("_workspace_fits", TORCH_BOX(&mnnvl_ar::workspace_fits));
  m.impl("_workspace_choice", TORCH_BOX(&mnnvl_ar::workspace_choice));
  m.impl("_workspace_slot_bytes", TORCH_BOX(&mnnvl_ar::workspace_slot_bytes));
  m.impl("_workspace_sleep", TORCH_BOX(&mnnvl_ar::workspace_sleep));
  m.impl("_workspace_fault", TORCH_BOX(&mnnvl_ar::workspace_fault));
  m.impl("_workspace_explain", TORCH_BOX(&mnnvl_ar::workspace_explain));
  m.impl("_workspace_reset", TORCH_BOX(&mnnvl_ar::workspace_reset));
  m.impl("_block_layout", TORCH_BOX(&mnnvl_ar::block_layout));
  m.impl("_block_canaries", TORCH_BOX(&mnnvl_ar::block_canaries));
#ifdef MNNVL_AR_TEST_BUILD
  m.impl("_sabotage", TORCH_BOX(&mnnvl_ar::sabotage));
#endif
}
