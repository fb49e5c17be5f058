#include "torch/checks.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "torch/workspace.h"

// Null under a PyTorch that is older than it.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace mnnvl_ar {
namespace {

struct KnownDtype {
  int32_t (*code)();
  const char* name;
  uintptr_t bytes;
};

constexpr KnownDtype kDtypes[] = {
    {aoti_torch_dtype_bfloat16, "bfloat16", 2},
    {aoti_torch_dtype_float16, "float16", 2},
    {aoti_torch_dtype_float32, "float32", 4},
    {aoti_torch_dtype_float64, "float64", 8},
    {aoti_torch_dtype_uint8, "uint8", 1},
    {aoti_torch_dtype_int8, "int8", 1},
    {aoti_torch_dtype_int32, "int32", 4},
    {aoti_torch_dtype_int64, "int64", 8},
    {aoti_torch_dtype_float8_e4m3fn, "float8_e4m3fn", 1},
};

const KnownDtype* find_dtype(int32_t code) {
  for (const KnownDtype& known : kDtypes) {
    if (known.code() == code) return &known;
  }
  return nullptr;
}

std::string name_of_dtype(int32_t code) {
  const auto type = static_cast<c10::ScalarType>(code);
  if (type == c10::ScalarType::Undefined) return "None";  // no tensor at all
  const KnownDtype* const known = find_dtype(code);
  return known != nullptr ? known->name : c10::toString(type);
}

std::string name_of_device(int64_t device) { return device < 0 ? "cpu" : "cuda:" + std::to_string(device); }

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return sizes;
}

std::string name_of_sizes(const std::vector<int64_t>& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

std::string name_of_sizes(const Tensor& tensor) { return name_of_sizes(sizes_of(tensor)); }

std::vector<int64_t> strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {strides.begin(), strides.end()};
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

int64_t device_of(const Tensor& tensor, const char* name) {
  if (tensor.is_cuda()) return tensor.get_device_index();
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": is on an unsupported device, wanted cuda or cpu");
  return -1;
}

void check_alignment(const Tensor& tensor, const char* name, uintptr_t alignment) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  STD_TORCH_CHECK(address % alignment == 0, name, ": starts ", address % alignment, " bytes past a ", alignment,
                  "-byte boundary, wanted a ", alignment, "-byte aligned tensor");
}

void check_memory(const Tensor& tensor, const char* name, uintptr_t alignment = protocol::kVectorBytes) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": is not contiguous, wanted a contiguous tensor");
  check_alignment(tensor, name, alignment);
}

void check_device(const Agreement& a, const Tensor& tensor, const char* name) {
  const int64_t device = device_of(tensor, name);
  STD_TORCH_CHECK(device == a.device, name, ": is on ", name_of_device(device), ", wanted ", name_of_device(a.device),
                  " like x");
}

}  // namespace

namespace {

int64_t last_dimension(const Tensor& tensor) { return tensor.dim() == 0 ? 1 : tensor.size(tensor.dim() - 1); }

int64_t element_bytes(const Agreement& a) { return a.dtype == protocol::Dtype::float32 ? 4 : 2; }

// All but the shape.
Agreement agreement_of(const Tensor& x) {
  const int32_t dtype_code = dtype_of(x);
  STD_TORCH_CHECK(static_cast<c10::ScalarType>(dtype_code) != c10::ScalarType::Undefined,
                  "x: is None, wanted a tensor");  // which has no device
  Agreement a{.dtype_code = dtype_code,
              .dtype = protocol::Dtype::float32,
              .device = device_of(x, "x"),
              .hidden = last_dimension(x),
              .shape = {},
              .x = x};
  if (a.dtype_code == aoti_torch_dtype_bfloat16()) {
    a.dtype = protocol::Dtype::bfloat16;
  } else if (a.dtype_code == aoti_torch_dtype_float16()) {
    a.dtype = protocol::Dtype::float16;
  } else {
    STD_TORCH_CHECK(a.dtype_code == aoti_torch_dtype_float32(), "x: is ", name_of_dtype(a.dtype_code),
                    ", wanted bfloat16, float16 or float32");
  }
  return a;
}

void set_shape(Agreement& a, int64_t tokens, int64_t row_bytes) {
  check_memory(a.x, "x");
  STD_TORCH_CHECK(tokens <= INT32_MAX, "x: has ", tokens, " tokens, wanted fewer than 2^31");
  a.shape.tokens = static_cast<uint32_t>(tokens);
  a.shape.vectors = static_cast<uint32_t>(row_bytes / protocol::kVectorBytes);
}

}  // namespace

Agreement check_input(const Tensor& x) {
  Agreement a = agreement_of(x);
  STD_TORCH_CHECK(x.dim() >= 1, "x: has no dimensions, wanted [..., hidden]");
  const int64_t row_bytes = a.hidden * element_bytes(a);
  STD_TORCH_CHECK(is_row(row_bytes), "x: rows of ", a.hidden, " elements are ", row_bytes,
                  " bytes, wanted a multiple of 16 bytes up to ", protocol::kMaxRowVectors * protocol::kVectorBytes);
  set_shape(a, x.numel() / a.hidden, row_bytes);
  return a;
}

Agreement check_elements(const Tensor& x) {
  Agreement a = agreement_of(x);
  int64_t row_bytes = a.hidden * element_bytes(a);
  const int64_t bytes = x.numel() * element_bytes(a);
  if (!is_row(row_bytes) || bytes / row_bytes > INT32_MAX) {
    STD_TORCH_CHECK(bytes % protocol::kVectorBytes == 0, "x: has shape ", name_of_sizes(x), ", ", bytes,
                    " bytes, wanted a multiple of 16 bytes");
    row_bytes = static_cast<int64_t>(protocol::widest_row(bytes / protocol::kVectorBytes)) * protocol::kVectorBytes;
  }
  set_shape(a, bytes / row_bytes, row_bytes);
  return a;
}

void check_alike(const Agreement& a, const Tensor& tensor, const char* name) {
  const int32_t code = dtype_of(tensor);
  STD_TORCH_CHECK(code == a.dtype_code, name, ": is ", name_of_dtype(code), ", wanted ", name_of_dtype(a.dtype_code),
                  " like x");
  check_device(a, tensor, name);
  const bool alike = last_dimension(tensor) == a.hidden && tensor.numel() == a.x.numel();
  STD_TORCH_CHECK(alike, name, ": has shape ", name_of_sizes(tensor), ", wanted ", name_of_sizes(a.x), " like x");
  check_memory(tensor, name);
}

bool check_weight(const Agreement& a, const Tensor& weight) {
  const int32_t code = dtype_of(weight);
  const bool is_fp32 = code == aoti_torch_dtype_float32();
  STD_TORCH_CHECK(is_fp32 || code == a.dtype_code, "weight: is ", name_of_dtype(code), ", wanted ",
                  name_of_dtype(a.dtype_code), " like x, or float32");
  check_device(a, weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == a.hidden, "weight: has shape ", name_of_sizes(weight),
                  ", wanted [", a.hidden, "]");
  check_memory(weight, "weight");
  return is_fp32;
}

void check_apart(const Span& out, const Span& other, Sharing sharing) {
  if (sharing == Sharing::all_or_nothing && out.begin == other.begin) return;
  const bool is_apart = out.begin + out.bytes <= other.begin || other.begin + other.bytes <= out.begin;
  STD_TORCH_CHECK(
      is_apart || out.bytes == 0, out.name, ": overlaps ", other.name, ", wanted ",
      sharing == Sharing::nothing ? "memory of its own" : "the same memory from its start on, or other memory");
}

void check_is(const Agreement& a, const Tensor& tensor, const Wanted& w) {
  const int32_t code = dtype_of(tensor);
  STD_TORCH_CHECK(code == w.dtype, w.name, ": is ", name_of_dtype(code), ", wanted ", name_of_dtype(w.dtype));
  check_device(a, tensor, w.name);
  STD_TORCH_CHECK(sizes_of(tensor) == w.sizes, w.name, ": has shape ", name_of_sizes(tensor), ", wanted ",
                  name_of_sizes(w.sizes));
  if (w.strides.empty()) return check_memory(tensor, w.name, w.alignment);
  STD_TORCH_CHECK(has_strides(tensor, w.strides), w.name, ": has strides ", name_of_sizes(strides_of(tensor)),
                  ", wanted ", name_of_sizes(w.strides), w.or_else);
  check_alignment(tensor, w.name, w.alignment);
}

bool has_strides(const Tensor& tensor, const std::vector<int64_t>& strides) {
  const std::vector<int64_t> has = strides_of(tensor);
  if (has.size() != strides.size()) return false;
  for (size_t i = 0; i < has.size(); ++i) {
    if (tensor.size(i) > 1 && has[i] != strides[i]) return false;
  }
  return true;
}

Span span_of(const Tensor& tensor, const Wanted& w) {
  const KnownDtype* const known = find_dtype(w.dtype);
  STD_TORCH_CHECK(known != nullptr, w.name, ": ", name_of_dtype(w.dtype), " is not known here");
  uintptr_t elements = tensor.numel() != 0;
  const std::vector<int64_t> strides = strides_of(tensor);
  for (int64_t i = 0; elements != 0 && i < tensor.dim(); ++i) elements += (tensor.size(i) - 1) * strides[i];
  return {reinterpret_cast<uintptr_t>(tensor.data_ptr()), elements * known->bytes, w.name};
}

Span span_of_rows(const Agreement& a, const Tensor& tensor, const char* name) {
  const uintptr_t bytes = uintptr_t{a.shape.tokens} * a.shape.vectors * protocol::kVectorBytes;
  return {reinterpret_cast<uintptr_t>(tensor.data_ptr()), bytes, name};
}

Span span_of_weight(const Agreement& a, const Tensor& weight, bool is_fp32) {
  const uintptr_t bytes = is_fp32 ? a.hidden * 4 : a.shape.vectors * protocol::kVectorBytes;
  return {reinterpret_cast<uintptr_t>(weight.data_ptr()), bytes, "weight"};
}

namespace {

Tensor empty_strided(const char* name, size_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                     int32_t device_type, int32_t device_index) {
  AtenTensorHandle handle = nullptr;
  const auto error =
      aoti_torch_empty_strided(static_cast<int64_t>(dims), sizes, strides, dtype, device_type, device_index, &handle);
  if (error != AOTI_TORCH_SUCCESS) {
    const char* const why = torch_exception_get_what_without_backtrace == nullptr
                                ? "PyTorch does not say why; out of memory?"
                                : torch_exception_get_what_without_backtrace();
    STD_TORCH_CHECK(false, name, ": PyTorch makes no such tensor: ", why);
  }
  return Tensor(handle);
}

}  // namespace

Tensor empty_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int32_t dtype = 0, device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  return empty_strided("output", sizes.size(), sizes.data(), strides.data(), dtype, device_type, device_index);
}

Tensor empty(const Agreement& a, const Wanted& w) {
  std::vector<int64_t> strides = w.strides;
  if (strides.empty()) {
    strides.assign(w.sizes.size(), 1);
    for (size_t i = w.sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, w.sizes[i]);
  }
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(a.x.get(), &device_index));
  return empty_strided(w.name, w.sizes.size(), w.sizes.data(), strides.data(), w.dtype, device_type, device_index);
}

void check_choice(int64_t value, int64_t least, int64_t most, const char* name, const char* wanted) {
  STD_TORCH_CHECK(value >= least && value <= most, name, ": is ", value, ", wanted ", wanted);
}

}  // namespace mnnvl_ar
