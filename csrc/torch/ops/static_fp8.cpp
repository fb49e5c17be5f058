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

// One element, with a dimension or none.
Wanted check_scale(const Agreement& a, const Tensor& scale) {
  const Wanted wanted{"scale", aoti_torch_dtype_float32(), std::vector<int64_t>(scale.dim() == 0 ? 0 : 1, 1), 4};
  check_is(a, scale, wanted);
  return wanted;
}

const float* value_of(const Tensor& scale) { return static_cast<const float*>(scale.data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> static_fp8(Tensor x, Tensor residual, Tensor weight, double eps, Tensor scale,
                                              int64_t workspace, bool with_norm, double weight_bias, int64_t strategy,
                                              int64_t pdl) {
  const Agreement a = check_halves(x);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  check_scale(a, scale);
  Tensor quant = empty(a, wanted_codes(a, "quant_out")), norm = empty_norm(a, with_norm), residual_out = empty_like(x);
  run<StaticFp8>(
      workspace, a, {strategy, pdl},
      {inputs.arguments(residual_out), value_of(scale), with_norm ? norm.data_ptr() : nullptr, quant.data_ptr()});
  return {quant, norm, residual_out};
}

void static_fp8_out(Tensor x, Tensor residual, Tensor weight, double eps, Tensor scale, Tensor quant_out,
                    std::optional<Tensor> norm_out, Tensor residual_out, int64_t workspace, double weight_bias,
                    int64_t strategy, int64_t pdl) {
  const Agreement a = check_halves(x);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  const Span factor = span_of(scale, check_scale(a, scale));
  const Wanted codes = wanted_codes(a, "quant_out");
  check_is(a, quant_out, codes);
  check_outputs(a, inputs, norm_out, residual_out, {span_of(quant_out, codes)}, {factor});
  run<StaticFp8>(workspace, a, {strategy, pdl},
                 {inputs.arguments(residual_out), value_of(scale), address_of(norm_out), quant_out.data_ptr()});
}

template <class Library>
void implement(Library& m) {
  m.impl("all_reduce_rms_norm_static_fp8", TORCH_BOX(&static_fp8));
  m.impl("all_reduce_rms_norm_static_fp8_out", TORCH_BOX(&static_fp8_out));
}

}  // namespace
}  // namespace mnnvl_ar

STABLE_TORCH_LIBRARY_FRAGMENT(mnnvl_ar, m) {
  m.def(
      "all_reduce_rms_norm_static_fp8(Tensor x, Tensor residual, Tensor weight, float eps, Tensor scale, "
      "int workspace, *, bool with_norm=False, float weight_bias=0.0, int strategy=-1, int pdl=-1) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "all_reduce_rms_norm_static_fp8_out(Tensor x, Tensor residual, Tensor weight, float eps, Tensor scale, "
      "Tensor(a!) quant_out, Tensor(b!)? norm_out, Tensor(c!) residual_out, int workspace, *, "
      "float weight_bias=0.0, int strategy=-1, int pdl=-1) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CPU, m) { mnnvl_ar::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CUDA, m) { mnnvl_ar::implement(m); }
