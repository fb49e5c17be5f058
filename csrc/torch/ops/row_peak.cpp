// Test builds only: torch.ops.mnnvl_ar._row_peak and _row_peak_out, the op of epilogues/row_peak.h.
#ifdef MNNVL_AR_TEST_BUILD
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "epilogues/row_peak.h"
#include "torch/norm_inputs.h"
#include "torch/run.h"

namespace mnnvl_ar {
namespace {

using epilogues::RowPeak;

// What is not like x: the input `scale`, and the outputs `high` and `peak`.
struct Others {
  explicit Others(const Agreement& a)
      : scale{"scale", aoti_torch_dtype_float32(), {1}, 4},
        high{"high", aoti_torch_dtype_uint8(), {a.shape.tokens, a.hidden}},
        peak{"peak", aoti_torch_dtype_float32(), {a.shape.tokens}} {}
  Wanted scale, high, peak;
};

RowPeak::Arguments arguments_of(const NormInputs& inputs, const Tensor& scale, const Tensor& high, const Tensor& peak,
                                const Tensor& residual_out) {
  return {inputs.arguments(residual_out), static_cast<const float*>(scale.data_ptr()), high.data_ptr(),
          peak.data_ptr()};
}

std::tuple<Tensor, Tensor, Tensor> row_peak(Tensor x, Tensor residual, Tensor weight, double eps, Tensor scale,
                                            int64_t workspace, int64_t strategy, int64_t pdl, int64_t tag) {
  const Agreement a = check_input(x);
  const Others others(a);
  const NormInputs inputs(a, residual, weight, eps, 0.0);
  check_is(a, scale, others.scale);
  Tensor high = empty(a, others.high), peak = empty(a, others.peak), residual_out = empty_like(x);
  run<RowPeak>(workspace, a, {strategy, pdl, tag}, arguments_of(inputs, scale, high, peak, residual_out));
  return {high, peak, residual_out};
}

void row_peak_out(Tensor x, Tensor residual, Tensor weight, double eps, Tensor scale, Tensor high, Tensor peak,
                  Tensor residual_out, int64_t workspace, int64_t strategy, int64_t pdl, int64_t tag) {
  const Agreement a = check_input(x);
  const Others others(a);
  const NormInputs inputs(a, residual, weight, eps, 0.0);
  check_is(a, scale, others.scale);
  check_is(a, high, others.high);
  check_is(a, peak, others.peak);
  check_alike(a, residual_out, "residual_out");
  const Span after = span_of_rows(a, residual_out, "residual_out"), factor = span_of(scale, others.scale);
  inputs.check_apart_from(after, Sharing::all_or_nothing);
  check_apart(after, factor, Sharing::nothing);
  const Span outputs[] = {span_of(high, others.high), span_of(peak, others.peak)};
  check_apart(outputs[0], outputs[1], Sharing::nothing);
  for (const Span& out : outputs) {
    check_apart(out, after, Sharing::nothing);
    check_apart(out, factor, Sharing::nothing);
    inputs.check_apart_from(out, Sharing::nothing);
  }
  run<RowPeak>(workspace, a, {strategy, pdl, tag}, arguments_of(inputs, scale, high, peak, residual_out));
}

template <class Library>
void implement(Library& m) {
  m.impl("_row_peak", TORCH_BOX(&row_peak));
  m.impl("_row_peak_out", TORCH_BOX(&row_peak_out));
}

}  // namespace
}  // namespace mnnvl_ar

STABLE_TORCH_LIBRARY_FRAGMENT(mnnvl_ar, m) {
  m.def(
      "_row_peak(Tensor x, Tensor residual, Tensor weight, float eps, Tensor scale, int workspace, *, "
      "int strategy=-1, int pdl=-1, int tag=0) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_row_peak_out(Tensor x, Tensor residual, Tensor weight, float eps, Tensor scale, Tensor(a!) high, "
      "Tensor(b!) peak, Tensor(c!) residual_out, int workspace, *, int strategy=-1, int pdl=-1, int tag=0) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CPU, m) { mnnvl_ar::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CUDA, m) { mnnvl_ar::implement(m); }
#endif
