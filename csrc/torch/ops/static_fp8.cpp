// torch.ops.mnnvl_ar.all_reduce_rms_norm_static_fp8 and its _out form. Names and docstrings for people: mnnvl_ar/ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "epilogues/static_fp8.h"
#include "torch/quantised.h"
#include "torch/run.h"

namespace mnnvl_ar {
namespace {

using epilogues::StaticFp8;

std::tuple<Tensor, Tensor, Tensor> static_fp8(Tensor x, Tensor residual, Tensor weight, double eps, Tensor scale,
                                              int64_t workspace, bool with_norm, double weight_bias, int64_t strategy,
                                              int64_t pdl, int64_t tag) {
  const Agreement a = check_halves(x);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  check_one(a, scale, "scale");
  Tensor quant = empty(a, wanted_codes(a, "quant_out")), norm = empty_norm(a, with_norm), residual_out = empty_like(x);
  run<StaticFp8>(
      workspace, a, {strategy, pdl, tag},
      {inputs.arguments(residual_out), with_norm ? norm.data_ptr() : nullptr, quant.data_ptr(), value_of(scale)});
  return {quant, norm, residual_out};
}

void static_fp8_out(Tensor x, Tensor residual, Tensor weight, double eps, Tensor scale, Tensor quant_out,
                    std::optional<Tensor> norm_out, Tensor residual_out, int64_t workspace, double weight_bias,
                    int64_t strategy, int64_t pdl, int64_t tag) {
  const Agreement a = check_halves(x);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  const Span factor = span_of(scale, check_one(a, scale, "scale"));
  const Wanted codes = wanted_codes(a, "quant_out");
  check_is(a, quant_out, codes);
  check_outputs(a, inputs, norm_out, residual_out, {span_of(quant_out, codes)}, {factor});
  run<StaticFp8>(workspace, a, {strategy, pdl, tag},
                 {inputs.arguments(residual_out), address_of(norm_out), quant_out.data_ptr(), value_of(scale)});
}

template <class Library>
void implement(Library& m) {
  implement_both(m, StaticFp8::kOp, TORCH_BOX(&static_fp8), TORCH_BOX(&static_fp8_out));
}

}  // namespace
}  // namespace mnnvl_ar

STABLE_TORCH_LIBRARY_FRAGMENT(mnnvl_ar, m) {
  mnnvl_ar::define(m, mnnvl_ar::StaticFp8::kOp, {.given = "Tensor scale, "});
}
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CPU, m) { mnnvl_ar::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CUDA, m) { mnnvl_ar::implement(m); }
