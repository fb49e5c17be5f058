// What every fused op is given beside x: residual, weight and the numbers of the norm, checked.
#pragma once

#include "epilogues/epilogue.h"
#include "protocol/nearest_float.h"
#include "torch/checks.h"

namespace mnnvl_ar {

class NormInputs {
 public:
  NormInputs(const Agreement& a, const Tensor& residual, const Tensor& weight, double eps, double weight_bias)
      : a_(a), residual_(residual), weight_(weight), eps_(eps), weight_bias_(weight_bias) {
    check_alike(a, residual, "residual");
    weight_is_fp32_ = check_weight(a, weight);
  }

  // `sharing`: whether the output may be x or residual itself, which takes their size. It never shares memory with the weight.
  void check_apart_from(const Span& out, Sharing sharing) const {
    check_apart(out, span_of_rows(a_, a_.x, "x"), sharing);
    check_apart(out, span_of_rows(a_, residual_, "residual"), sharing);
    check_apart(out, span_of_weight(a_, weight_, weight_is_fp32_), Sharing::nothing);
  }

  // Outputs of the size of x that the caller gives: like x, apart from each other and from what they may not share memory with.
  void check_outputs(const Tensor& norm_out, const Tensor& residual_out) const {
    check_alike(a_, norm_out, "norm_out");
    check_alike(a_, residual_out, "residual_out");
    const Span norm = span_of_rows(a_, norm_out, "norm_out"), after = span_of_rows(a_, residual_out, "residual_out");
    check_apart(norm, after, Sharing::nothing);
    check_apart_from(norm, Sharing::all_or_nothing);
    check_apart_from(after, Sharing::all_or_nothing);
  }

  epilogues::NormArguments arguments(const Tensor& residual_out) const {
    return {.residual = residual_.data_ptr(),
            .weight = weight_.data_ptr(),
            .residual_out = residual_out.data_ptr(),
            .eps = protocol::nearest_float(eps_),
            .weight_bias = protocol::nearest_float(weight_bias_),
            .weight_is_fp32 = weight_is_fp32_};
  }

 private:
  const Agreement& a_;
  const Tensor& residual_;
  const Tensor& weight_;
  const double eps_, weight_bias_;
  bool weight_is_fp32_;
};

}  // namespace mnnvl_ar
