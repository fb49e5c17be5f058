// torch.ops.mnnvl_ar.all_reduce_rms_norm_static_fp8 and its _out form. Names and docstrings for people: mnnvl_ar/ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "epilogues/static_fp8.h"
#include "torch/norm_inputs.h"
#include "torch/run.h"

namespace mnnvl_ar {
namespace {

using epilogues::StaticFp8;

// x as rows of 16 bits.
Agreement check_halves(const Tensor& x) {
  const Agreement a = check_input(x);
  STD_TORCH_CHECK(a.dtype != protocol::Dtype::float32, "x: is float32, wanted bfloat16 or float16");
  return a;
}

// What is not like x: the input `scale`, of one element, and the output `quant_out`.
struct Others {
  Others(const Agreement& a, const Tensor& scale)
      : scale{"scale", aoti_torch_dtype_float32(), std::vector<int64_t>(scale.dim() == 0 ? 0 : 1, 1), 4},
        quant{"quant_out", aoti_torch_dtype_float8_e4m3fn(), {}, sizeof(protocol::Codes8)} {
    for (int64_t i = 0; i < a.x.dim(); ++i) quant.sizes.push_back(a.x.size(i));
    check_is(a, scale, this->scale);
  }
  Wanted scale, quant;
};

StaticFp8::Arguments arguments_of(const NormInputs& inputs, const Tensor& scale, const Tensor& quant, void* norm,
                                  const Tensor& residual_out) {
  return {inputs.arguments(residual_out), static_cast<const float*>(scale.data_ptr()), norm, quant.data_ptr()};
}

std::tuple<Tensor, Tensor, Tensor> static_fp8(Tensor x, Tensor residual, Tensor weight, double eps, Tensor scale,
                                              int64_t workspace, bool with_norm, double weight_bias, int64_t strategy,
                                              int64_t pdl) {
  const Agreement a = check_halves(x);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  const Others others(a, scale);
  Tensor quant_out = empty(a, others.quant), residual_out = empty_like(x);
  Tensor norm_out = with_norm ? empty_like(x) : empty(a, {"norm_out", a.dtype_code, {0}});
  run<StaticFp8>(workspace, a, {strategy, pdl},
                 arguments_of(inputs, scale, quant_out, with_norm ? norm_out.data_ptr() : nullptr, residual_out));
  return {quant_out, norm_out, residual_out};
}

void static_fp8_out(Tensor x, Tensor residual, Tensor weight, double eps, Tensor scale, Tensor quant_out,
                    std::optional<Tensor> norm_out, Tensor residual_out, int64_t workspace, double weight_bias,
                    int64_t strategy, int64_t pdl) {
  const Agreement a = check_halves(x);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  const Others others(a, scale);
  check_is(a, quant_out, others.quant);
  check_alike(a, residual_out, "residual_out");
  const Span quant = span_of(quant_out, others.quant), factor = span_of(scale, others.scale);
  const Span after = span_of_rows(a, residual_out, "residual_out");
  inputs.check_apart_from(quant, Sharing::nothing);
  inputs.check_apart_from(after, Sharing::all_or_nothing);
  check_apart(quant, factor, Sharing::nothing);
  check_apart(quant, after, Sharing::nothing);
  check_apart(after, factor, Sharing::nothing);
  if (norm_out.has_value()) {
    check_alike(a, *norm_out, "norm_out");
    const Span norm = span_of_rows(a, *norm_out, "norm_out");
    inputs.check_apart_from(norm, Sharing::all_or_nothing);
    check_apart(norm, factor, Sharing::nothing);
    check_apart(norm, after, Sharing::nothing);
    check_apart(quant, norm, Sharing::nothing);
  }
  run<StaticFp8>(
      workspace, a, {strategy, pdl},
      arguments_of(inputs, scale, quant_out, norm_out.has_value() ? norm_out->data_ptr() : nullptr, residual_out));
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
