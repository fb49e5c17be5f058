// torch.ops.mnnvl_ar.all_reduce_rms_norm and all_reduce_rms_norm_out. Names and docstrings for people: mnnvl_ar/ops.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "epilogues/rms_norm.h"
#include "torch/norm_inputs.h"
#include "torch/run.h"

namespace mnnvl_ar {
namespace {

using epilogues::RmsNorm;

std::tuple<Tensor, Tensor> all_reduce_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps, int64_t workspace,
                                               double weight_bias, int64_t strategy, int64_t pdl, int64_t tag) {
  const Agreement a = check_input(x);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  Tensor norm_out = empty_like(x), residual_out = empty_like(x);
  run<RmsNorm>(workspace, a, {strategy, pdl, tag}, {inputs.arguments(residual_out), norm_out.data_ptr()});
  return {norm_out, residual_out};
}

void all_reduce_rms_norm_out(Tensor x, Tensor residual, Tensor weight, double eps, Tensor norm_out, Tensor residual_out,
                             int64_t workspace, double weight_bias, int64_t strategy, int64_t pdl, int64_t tag) {
  const Agreement a = check_input(x);
  const NormInputs inputs(a, residual, weight, eps, weight_bias);
  inputs.check_outputs(norm_out, residual_out);
  run<RmsNorm>(workspace, a, {strategy, pdl, tag}, {inputs.arguments(residual_out), norm_out.data_ptr()});
}

template <class Library>
void implement(Library& m) {
  m.impl("all_reduce_rms_norm", TORCH_BOX(&all_reduce_rms_norm));
  m.impl("all_reduce_rms_norm_out", TORCH_BOX(&all_reduce_rms_norm_out));
}

}  // namespace
}  // namespace mnnvl_ar

STABLE_TORCH_LIBRARY_FRAGMENT(mnnvl_ar, m) {
  m.def(
      "all_reduce_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, int workspace, *, "
      "float weight_bias=0.0, int strategy=-1, int pdl=-1, int tag=0) -> (Tensor, Tensor)");
  m.def(
      "all_reduce_rms_norm_out(Tensor x, Tensor residual, Tensor weight, float eps, Tensor(a!) norm_out, "
      "Tensor(b!) residual_out, int workspace, *, float weight_bias=0.0, int strategy=-1, int pdl=-1, int tag=0) -> "
      "()");
}
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CPU, m) { mnnvl_ar::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CUDA, m) { mnnvl_ar::implement(m); }
