// torch.ops.mnnvl_ar.all_reduce_rms_norm_per_token_group_fp8 and its _out form. Names and docstrings for people: mnnvl_ar/ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "torch/block_scaled.h"

namespace mnnvl_ar {
namespace {

constexpr protocol::Op kOp = protocol::Op::all_reduce_rms_norm_per_token_group_fp8;

std::tuple<Tensor, Tensor, Tensor, Tensor> per_token_group_fp8(Tensor x, Tensor residual, Tensor weight, double eps,
                                                               int64_t workspace, int64_t scales, int64_t layout,
                                                               bool with_norm, double weight_bias, int64_t strategy,
                                                               int64_t pdl, int64_t tag) {
  const BlockFormat format = group_format(scales);
  const Agreement a = check_blocks(x, format);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  const Scales placing = group_scales(a, format, layout);
  Tensor quant = empty(a, wanted_codes(a, "quant_out")), scale = empty(a, placing.wanted);
  Tensor norm = empty_norm(a, with_norm), residual_out = empty_like(x);
  run<BlockScaled, kOp>(workspace, a, {strategy, pdl, tag},
                        {{inputs.arguments(residual_out), with_norm ? norm.data_ptr() : nullptr, quant.data_ptr()},
                         format,
                         placed(a, format, placing, scale),
                         nullptr});
  return {quant, scale, norm, residual_out};
}

void per_token_group_fp8_out(Tensor x, Tensor residual, Tensor weight, double eps, Tensor quant_out, Tensor scale_out,
                             std::optional<Tensor> norm_out, Tensor residual_out, int64_t workspace, int64_t scales,
                             double weight_bias, int64_t strategy, int64_t pdl, int64_t tag) {
  const BlockFormat format = group_format(scales);
  const Agreement a = check_blocks(x, format);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  const Wanted codes = wanted_codes(a, "quant_out");
  check_is(a, quant_out, codes);
  const Scales placing = check_group_scales(a, format, scale_out);
  check_outputs(a, inputs, norm_out, residual_out, {span_of(quant_out, codes), span_of(scale_out, placing.wanted)});
  run<BlockScaled, kOp>(workspace, a, {strategy, pdl, tag},
                        {{inputs.arguments(residual_out), address_of(norm_out), quant_out.data_ptr()},
                         format,
                         placed(a, format, placing, scale_out),
                         nullptr});
}

template <class Library>
void implement(Library& m) {
  implement_both(m, kOp, TORCH_BOX(&per_token_group_fp8), TORCH_BOX(&per_token_group_fp8_out));
}

}  // namespace
}  // namespace mnnvl_ar

STABLE_TORCH_LIBRARY_FRAGMENT(mnnvl_ar, m) {
  mnnvl_ar::define(m, mnnvl_ar::kOp,
                   {.has_scales = true, .options = "int scales=0, int layout=-1, ", .out_options = "int scales=0, "});
}
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CPU, m) { mnnvl_ar::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CUDA, m) { mnnvl_ar::implement(m); }
