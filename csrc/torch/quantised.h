// What all ops with a quantised output share: their schemas, and what they check beside the norm's inputs.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "epilogues/list.h"
#include "epilogues/quantised.h"
#include "protocol/numerics_fp8.h"
#include "torch/norm_inputs.h"

namespace mnnvl_ar {

// ---- schemas

struct QuantisedSchema {
  std::string given = {};   // arguments between eps and the outputs or the workspace, each with ", " behind it
  bool has_scales = false;  // whether scales are an output
  std::string options = {}, out_options = {};  // keywords of its own, of either form, likewise
};

// An op of the epilogue list, functional and _out.
template <class Library>
void define(Library& m, protocol::Op op, const QuantisedSchema& s) {
  const std::string name = epilogues::find(op)->name;
  const std::string inputs = "(Tensor x, Tensor residual, Tensor weight, float eps, " + s.given;
  const std::string choices = "float weight_bias=0.0, int strategy=-1, int pdl=-1, int tag=0) -> ";
  m.def((name + inputs + "int workspace, *, " + s.options + "bool with_norm=False, " + choices + "(Tensor, Tensor, " +
         (s.has_scales ? "Tensor, " : "") + "Tensor)")
            .c_str());
  m.def((name + "_out" + inputs + "Tensor(a!) quant_out, " + (s.has_scales ? "Tensor(b!) scale_out, " : "") +
         "Tensor(c!)? norm_out, Tensor(d!) residual_out, int workspace, *, " + s.out_options + choices + "()")
            .c_str());
}

template <class Library, class Boxed>
void implement_both(Library& m, protocol::Op op, Boxed functional, Boxed out) {
  const std::string name = epilogues::find(op)->name;
  m.impl(name.c_str(), functional);
  m.impl((name + "_out").c_str(), out);
}

// ---- checks

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

// Of an input of one element, with a dimension or none, such as a scale.
inline Wanted check_one(const Agreement& a, const Tensor& tensor, const char* name) {
  const Wanted wanted{name, aoti_torch_dtype_float32(), std::vector<int64_t>(tensor.dim() == 0 ? 0 : 1, 1), 4};
  check_is(a, tensor, wanted);
  return wanted;
}

inline const float* value_of(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }

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
