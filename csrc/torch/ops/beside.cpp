// torch.ops.mnnvl_ar._norm_call: a call of all_reduce_rms_norm, checked and given its place, for a kernel that is not in the library
// (mnnvl_ar/dsl). Private; every argument and result has a name.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "epilogues/rms_norm.h"
#include "torch/norm_inputs.h"
#include "torch/run.h"

namespace mnnvl_ar {
namespace {

using Numbers = std::vector<int64_t>;

int64_t address_of(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)); }

// Refuses what the op refuses, with outputs that are given what its `_out` form does. Whoever asks has to launch all pieces, on the
// current stream, one after the other: their numbers are taken, and a graph that captures is noted.
std::tuple<Numbers, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
           Numbers>
norm_call(Tensor x, Tensor residual, Tensor weight, double eps, std::optional<Tensor> norm_out,
          std::optional<Tensor> residual_out, int64_t workspace, double weight_bias, int64_t strategy, int64_t pdl,
          int64_t tag) {
  const Agreement a = check_input(x);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  if (norm_out && residual_out) inputs.check_outputs(*norm_out, *residual_out);
  const epilogues::NormArguments arguments = inputs.arguments(x);
  detail::Turn turn(workspace, protocol::Op::all_reduce_rms_norm, a, {strategy, pdl, tag});
  Numbers pieces;
  detail::Room room{};
  while (turn.next()) {
    protocol::Params params = turn.params();
    room = turn.announce(params);
    const protocol::Tensors& t = params.tensors;
    const uint32_t description = t.description | arguments.variant() << protocol::kVariantAt;
    for (uint32_t word : {t.tokens, t.first_token, t.call_tokens, description, params.launch.number,
                          params.launch.trigger_early, params.launch.programmatic}) {
      pieces.push_back(word);
    }
  }
  const protocol::Group& g = turn.params().group;
  Numbers blocks;
  for (uint32_t i = 0; i < g.ranks; ++i) blocks.push_back(address_of(g.peers[i]));
  return {blocks,
          g.rank,
          static_cast<int64_t>(g.slot_bytes),
          address_of(g.record),
          address_of(g.orders),
          address_of(g.multicast),
          room.max_ctas,
          room.sharers,
          room.processors,
          arguments.weight_is_fp32,
          arguments.numbers().eps,
          arguments.numbers().weight_bias,
          pieces};
}

}  // namespace
}  // namespace mnnvl_ar

// blocks: in rotated order, as csrc/protocol/params.h has them. pieces: of each seven numbers, tokens, first_token, call_tokens,
// description, number, trigger_early and programmatic; none for a call of no tokens.
STABLE_TORCH_LIBRARY_FRAGMENT(mnnvl_ar, m) {
  m.def(
      "_norm_call(Tensor x, Tensor residual, Tensor weight, float eps, Tensor? norm_out, Tensor? residual_out, int "
      "workspace, *, float weight_bias=0.0, int strategy=-1, int pdl=-1, int tag=0) -> (int[] blocks, int rank, int "
      "slot_bytes, int record, int orders, int multicast, int max_ctas, int sharers, int processors, int "
      "weight_is_fp32, int eps, int "
      "weight_bias, int[] pieces)");
}
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CPU, m) { m.impl("_norm_call", TORCH_BOX(&mnnvl_ar::norm_call)); }
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CUDA, m) { m.impl("_norm_call", TORCH_BOX(&mnnvl_ar::norm_call)); }
