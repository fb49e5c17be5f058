// torch.ops.mnnvl_ar.all_reduce_rms_norm_mxfp8 and its _out form. Names and docstrings for people: mnnvl_ar/ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "torch/block_scaled.h"

namespace mnnvl_ar {
namespace {

constexpr protocol::Op kOp = protocol::Op::all_reduce_rms_norm_mxfp8;
constexpr BlockFormat kFormat = BlockFormat::mxfp8;

std::tuple<Tensor, Tensor, Tensor, Tensor> mxfp8(Tensor x, Tensor residual, Tensor weight, double eps,
                                                 int64_t workspace, int64_t layout, bool with_norm, double weight_bias,
                                                 int64_t strategy, int64_t pdl, int64_t tag) {
  const Agreement a = check_blocks(x, kFormat);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  const Scales scales = byte_scales(a, kFormat, layout);
  Tensor quant = empty(a, wanted_codes(a, "quant_out")), scale = empty(a, scales.wanted);
  Tensor norm = empty_norm(a, with_norm), residual_out = empty_like(x);
  run<BlockScaled, kOp>(workspace, a, {strategy, pdl, tag},
                        {{inputs.arguments(residual_out), with_norm ? norm.data_ptr() : nullptr, quant.data_ptr()},
                         kFormat,
                         placed(a, kFormat, scales, scale),
                         nullptr});
  return {quant, scale, norm, residual_out};
}

void mxfp8_out(Tensor x, Tensor residual, Tensor weight, double eps, Tensor quant_out, Tensor scale_out,
               std::optional<Tensor> norm_out, Tensor residual_out, int64_t workspace, int64_t layout,
               double weight_bias, int64_t strategy, int64_t pdl, int64_t tag) {
  const Agreement a = check_blocks(x, kFormat);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  const Wanted codes = wanted_codes(a, "quant_out");
  check_is(a, quant_out, codes);
  const Scales scales = check_byte_scales(a, kFormat, layout, scale_out);
  check_outputs(a, inputs, norm_out, residual_out, {span_of(quant_out, codes), span_of(scale_out, scales.wanted)});
  run<BlockScaled, kOp>(workspace, a, {strategy, pdl, tag},
                        {{inputs.arguments(residual_out), address_of(norm_out), quant_out.data_ptr()},
                         kFormat,
                         placed(a, kFormat, scales, scale_out),
                         nullptr});
}

template <class Library>
void implement(Library& m) {
  implement_both(m, kOp, TORCH_BOX(&mxfp8), TORCH_BOX(&mxfp8_out));
}

}  // namespace
}  // namespace mnnvl_ar

STABLE_TORCH_LIBRARY_FRAGMENT(mnnvl_ar, m) {
  mnnvl_ar::define(m, mnnvl_ar::kOp,
                   {.has_scales = true, .options = "int layout=0, ", .out_options = "int layout=0, "});
}
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CPU, m) { mnnvl_ar::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CUDA, m) { mnnvl_ar::implement(m); }
