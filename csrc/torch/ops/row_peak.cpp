// Test builds only: torch.ops.mnnvl_ar._row_peak_out, the op of epilogues/row_peak.h.
#ifdef MNNVL_AR_TEST_BUILD
#include <torch/csrc/stable/library.h>

#include "epilogues/row_peak.h"
#include "torch/norm_inputs.h"
#include "torch/run.h"

namespace mnnvl_ar {
namespace {

using epilogues::RowPeak;

// high: [tokens, hidden] bytes; peak: [tokens] fp32. The caller sees to it that they are.
void row_peak_out(Tensor x, Tensor residual, Tensor weight, double eps, Tensor high, Tensor peak, Tensor residual_out,
                  int64_t workspace, int64_t strategy, int64_t pdl) {
  const Agreement a = check_input(x);
  const NormInputs inputs(a, residual, weight, eps, 0.0);
  check_alike(a, residual_out, "residual_out");
  run<RowPeak>(workspace, a, {strategy, pdl}, {inputs.arguments(residual_out), high.data_ptr(), peak.data_ptr()});
}

template <class Library>
void implement(Library& m) {
  m.impl("_row_peak_out", TORCH_BOX(&row_peak_out));
}

}  // namespace
}  // namespace mnnvl_ar

STABLE_TORCH_LIBRARY_FRAGMENT(mnnvl_ar, m) {
  m.def(
      "_row_peak_out(Tensor x, Tensor residual, Tensor weight, float eps, Tensor(a!) high, Tensor(b!) peak, "
      "Tensor(c!) residual_out, int workspace, *, int strategy=-1, int pdl=-1) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CPU, m) { mnnvl_ar::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CUDA, m) { mnnvl_ar::implement(m); }
#endif
