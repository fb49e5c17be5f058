// What is asked of every argument before anything is launched. Each error names argument, got and wanted.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "protocol/layout.h"
#include "protocol/signature.h"

namespace mnnvl_ar {

using torch::stable::Tensor;

// What all tensors of a call agree on: x says it, the others are held against it.
struct Agreement {
  int32_t dtype_code;  // PyTorch's
  protocol::Dtype dtype;
  int64_t device;         // CUDA index, -1: host
  int64_t hidden;         // the last dimension of x
  protocol::Shape shape;  // ranks is left 0
  const Tensor& x;
};

// x as rows: [..., hidden], of whole vectors.
Agreement check_input(const Tensor& x);
// x of an op that takes each element for itself: any tensor of whole vectors. One that is no rows is taken as rows of another shape,
// as long as they can be.
Agreement check_elements(const Tensor& x);
void check_alike(const Agreement& agreement, const Tensor& tensor, const char* name);
// Returns whether the weight is fp32.
bool check_weight(const Agreement& agreement, const Tensor& weight);

// A tensor that is not like x, an output or a scale: what a call wants of it. It is where x is.
struct Wanted {
  const char* name;
  int32_t dtype;  // PyTorch's code
  std::vector<int64_t> sizes;
  uintptr_t alignment = protocol::kVectorBytes;
  std::vector<int64_t> strides = {};  // none: contiguous. Of a dimension of one, any will do
  const char* or_else = "";           // other strides that would have done
};
void check_is(const Agreement& agreement, const Tensor& tensor, const Wanted& wanted);
bool has_strides(const Tensor& tensor, const std::vector<int64_t>& strides);

// Memory of a tensor.
struct Span {
  uintptr_t begin;
  uintptr_t bytes;
  const char* name;
};

enum class Sharing { nothing, all_or_nothing };

// An output may start where an input of the same size does, and overlap nothing else: each vector is read before it is written,
// but in no order that a caller could know.
void check_apart(const Span& out, const Span& other, Sharing sharing);
// As many bytes as x has, or as a weight has.
Span span_of_rows(const Agreement& agreement, const Tensor& tensor, const char* name);
Span span_of_weight(const Agreement& agreement, const Tensor& weight, bool is_fp32);

Span span_of(const Tensor& tensor, const Wanted& wanted);

Tensor empty_like(const Tensor& x);
// What `wanted` describes, where x is.
Tensor empty(const Agreement& agreement, const Wanted& wanted);

void check_choice(int64_t value, int64_t least, int64_t most, const char* name, const char* wanted);

}  // namespace mnnvl_ar
