// torch.ops.mnnvl_ar.all_reduce_rms_norm_per_token_fp8 and its _out form. Names and docstrings for people: mnnvl_ar/ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "epilogues/per_token_fp8.h"
#include "torch/quantised.h"
#include "torch/run.h"

namespace mnnvl_ar {
namespace {

using epilogues::PerTokenFp8;

Wanted wanted_scales(const Agreement& a) { return {"scale_out", aoti_torch_dtype_float32(), {a.shape.tokens, 1}, 4}; }

std::tuple<Tensor, Tensor, Tensor, Tensor> per_token_fp8(Tensor x, Tensor residual, Tensor weight, double eps,
                                                         int64_t workspace, bool with_norm, double weight_bias,
                                                         int64_t strategy, int64_t pdl, int64_t tag) {
  const Agreement a = check_halves(x);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  Tensor quant = empty(a, wanted_codes(a, "quant_out")), scale = empty(a, wanted_scales(a));
  Tensor norm = empty_norm(a, with_norm), residual_out = empty_like(x);
  run<PerTokenFp8>(
      workspace, a, {strategy, pdl, tag},
      {inputs.arguments(residual_out), with_norm ? norm.data_ptr() : nullptr, quant.data_ptr(), scale.data_ptr()});
  return {quant, scale, norm, residual_out};
}

void per_token_fp8_out(Tensor x, Tensor residual, Tensor weight, double eps, Tensor quant_out, Tensor scale_out,
                       std::optional<Tensor> norm_out, Tensor residual_out, int64_t workspace, double weight_bias,
                       int64_t strategy, int64_t pdl, int64_t tag) {
  const Agreement a = check_halves(x);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  const Wanted codes = wanted_codes(a, "quant_out"), scales = wanted_scales(a);
  check_is(a, quant_out, codes);
  check_is(a, scale_out, scales);
  check_outputs(a, inputs, norm_out, residual_out, {span_of(quant_out, codes), span_of(scale_out, scales)});
  run<PerTokenFp8>(workspace, a, {strategy, pdl, tag},
                   {inputs.arguments(residual_out), address_of(norm_out), quant_out.data_ptr(), scale_out.data_ptr()});
}

template <class Library>
void implement(Library& m) {
  implement_both(m, PerTokenFp8::kOp, TORCH_BOX(&per_token_fp8), TORCH_BOX(&per_token_fp8_out));
}

}  // namespace
}  // namespace mnnvl_ar

STABLE_TORCH_LIBRARY_FRAGMENT(mnnvl_ar, m) { mnnvl_ar::define(m, mnnvl_ar::PerTokenFp8::kOp, {.has_scales = true}); }
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CPU, m) { mnnvl_ar::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CUDA, m) { mnnvl_ar::implement(m); }
