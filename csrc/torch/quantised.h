// What every op with a quantised output checks beside the norm's inputs.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include "protocol/numerics_fp8.h"
#include "torch/norm_inputs.h"

namespace mnnvl_ar {

// x as rows of 16 bits: no others are quantised.
inline Agreement check_halves(const Tensor& x) {
  const Agreement a = check_input(x);
  STD_TORCH_CHECK(a.dtype != protocol::Dtype::float32, "x: is float32, wanted bfloat16 or float16");
  return a;
}

// e4m3 codes in the shape of x.
inline Wanted wanted_codes(const Agreement& a, const char* name) {
  Wanted codes{name, aoti_torch_dtype_float8_e4m3fn(), {}, sizeof(protocol::Codes8)};
  for (int64_t i = 0; i < a.x.dim(); ++i) codes.sizes.push_back(a.x.size(i));
  return codes;
}

// Norm of the functional form: no elements where it is not wanted.
inline Tensor empty_norm(const Agreement& a, bool is_wanted) {
  return is_wanted ? empty_like(a.x) : empty(a, {"norm_out", a.dtype_code, {0}});
}

inline void* address_of(const std::optional<Tensor>& norm_out) {
  return norm_out.has_value() ? norm_out->data_ptr() : nullptr;
}

// residual_out and norm_out are like x, and each may be x or residual. `outputs`, checked already, have memory of their own, and
// nothing that is written overlaps `given`.
inline void check_outputs(const Agreement& a, const NormInputs& inputs, const std::optional<Tensor>& norm_out,
                          const Tensor& residual_out, std::initializer_list<Span> outputs,
                          std::initializer_list<Span> given = {}) {
  check_alike(a, residual_out, "residual_out");
  std::vector<Span> written{span_of_rows(a, residual_out, "residual_out")};
  if (norm_out.has_value()) {
    check_alike(a, *norm_out, "norm_out");
    written.push_back(span_of_rows(a, *norm_out, "norm_out"));
  }
  for (const Span& rows : written) inputs.check_apart_from(rows, Sharing::all_or_nothing);
  for (const Span& output : outputs) {
    inputs.check_apart_from(output, Sharing::nothing);
    written.push_back(output);
  }
  for (size_t i = 0; i < written.size(); ++i) {
    for (size_t j = 0; j < i; ++j) check_apart(written[i], written[j], Sharing::nothing);
    for (const Span& input : given) check_apart(written[i], input, Sharing::nothing);
  }
}

}  // namespace mnnvl_ar
