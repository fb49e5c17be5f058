// csrc/protocol/numerics_fp8.h, numerics_fp4.h and scale_layout.h for the unit tests: a part of the module of protocol.cpp.
//
// Contract: as there. Rows are uint16 bits [rows, hidden] of "bfloat16" or "float16". Codes and byte scales are uint8.
#include "quantised.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "epilogues/block_scales.h"
#include "protocol/numerics.h"
#include "protocol/numerics_fp4.h"
#include "protocol/numerics_fp8.h"
#include "protocol/scale_layout.h"

namespace py = pybind11;
using namespace mnnvl_ar::protocol;

namespace {

using Bytes = Array<uint8_t>;

template <class Convert>
auto of_words(Convert convert) {
  return [convert](const Words& bits) {
    Bytes codes(bits.size());
    for (py::ssize_t i = 0; i < bits.size(); ++i) {
      codes.mutable_data()[i] = static_cast<uint8_t>(convert(bits.data()[i]));
    }
    return codes;
  };
}

template <class Convert>
auto fp32_of_words(Convert convert) {
  return [convert](const Words& words) {
    Words values(words.size());
    for (py::ssize_t i = 0; i < words.size(); ++i) values.mutable_data()[i] = as_bits(convert(words.data()[i]));
    return values;
  };
}

template <class Work>
auto with(const std::string& dtype, Work work) {
  if (dtype == "bfloat16") return work(Bfloat16{});
  if (dtype == "float16") return work(Float16{});
  throw std::invalid_argument("dtype: " + dtype);
}

// Rows in blocks that share a scale: `scale_of(most)` once a block, then `codes_of(vector, scale)` once a vector. What an epilogue
// does, with threads in place of loops. `bits` of a code: 8 or 4; a scale is stored as `Stored`.
template <class D, class Stored, class ScaleOf, class CodesOf>
std::pair<Bytes, Array<Stored>> in_blocks(const Halves& norm, py::ssize_t block, int bits, ScaleOf scale_of,
                                          CodesOf codes_of) {
  if (norm.ndim() != 2) throw std::invalid_argument("norm: [rows, hidden] wanted");
  const py::ssize_t rows = norm.shape(0), hidden = norm.shape(1);
  if (block == 0) block = hidden;  // a row
  if (block % 8 != 0 || hidden % block != 0) throw std::invalid_argument("hidden: not a multiple of the block");
  Bytes codes({rows, hidden * bits / 8});
  Array<Stored> scales({rows, hidden / block});
  for (py::ssize_t i = 0; i < rows * hidden / block; ++i) {
    std::vector<Vector> vectors(block / 8);
    std::memcpy(vectors.data(), norm.data() + i * block, block * 2);
    uint32_t most = 0;
    for (const Vector& v : vectors) most = std::max(most, largest<D>(v));
    const auto scale = scale_of(most);
    scales.mutable_data()[i] = scale.stored;
    for (py::ssize_t v = 0; v < block / 8; ++v) {
      const auto code = codes_of(vectors[v], scale);
      static_assert(sizeof code == 8 || sizeof code == 4);
      std::memcpy(codes.mutable_data() + (i * block / 8 + v) * sizeof code, &code, sizeof code);
    }
  }
  return {codes, scales};
}

template <class Stored, class Scaled>
struct Scale {
  Stored stored;
  Scaled scaled;
};

Bytes static_codes(const std::string& dtype, const Halves& norm, uint32_t scale) {
  return with(dtype, [&](auto d) {
    using D = decltype(d);
    const auto of_all = [&](uint32_t) { return Scale<uint8_t, Times>{0, static_fp8(as_float(scale))}; };
    return in_blocks<D, uint8_t>(norm, 8, 8, of_all, [](const Vector& v, auto s) { return e4m3_codes<D>(v, s.scaled); })
        .first;
  });
}

template <class D>
auto divided(const Halves& norm, py::ssize_t block, float (*scale_of)(uint32_t)) {
  return in_blocks<D, uint32_t>(
      norm, block, 8,
      [=](uint32_t most) {
        const float scale = scale_of(most);
        return Scale<uint32_t, Over>{as_bits(scale), Over(scale)};
      },
      [](const Vector& v, auto s) { return e4m3_codes<D>(v, s.scaled); });
}

// [rows, 1] and [rows, groups] fp32 bits.
auto per_token(const std::string& dtype, const Halves& norm) {
  return with(dtype, [&](auto d) { return divided<decltype(d)>(norm, 0, token_scale); });
}

auto per_group(const std::string& dtype, const Halves& norm, bool power) {
  return with(dtype, [&](auto d) {
    using D = decltype(d);
    if (!power) return divided<D>(norm, 128, group_scale);
    return in_blocks<D, uint32_t>(
        norm, 128, 8,
        [](uint32_t most) {
          return Scale<uint32_t, Times>{as_bits(group_scale_power(most)), group_power_factor(most)};
        },
        [](const Vector& v, auto s) { return e4m3_codes<D>(v, s.scaled); });
  });
}

// Their bytes, for packing.
Bytes group_bytes(const std::string& dtype, const Halves& norm) {
  return with(dtype, [&](auto d) {
    using D = decltype(d);
    return in_blocks<D, uint8_t>(
               norm, 128, 8,
               [](uint32_t most) {
                 return Scale<uint8_t, Over>{static_cast<uint8_t>(group_scale_e8m0(most)),
                                             Over(group_scale_power(most))};
               },
               [](const Vector& v, auto s) { return e4m3_codes<D>(v, s.scaled); })
        .second;
  });
}

auto mxfp8(const std::string& dtype, const Halves& norm) {
  return with(dtype, [&](auto d) {
    using D = decltype(d);
    return in_blocks<D, uint8_t>(
        norm, 32, 8,
        [](uint32_t most) {
          const uint32_t scale = mxfp8_scale(most);
          return Scale<uint8_t, Times>{static_cast<uint8_t>(scale), mxfp8_factor(scale)};
        },
        [](const Vector& v, auto s) { return e4m3_codes<D>(v, s.scaled); });
  });
}

auto nvfp4(const std::string& dtype, const Halves& norm, uint32_t global) {
  return with(dtype, [&](auto d) {
    using D = decltype(d);
    return in_blocks<D, uint8_t>(
        norm, 16, 4,
        [=](uint32_t most) {
          const Nvfp4Block block = nvfp4_block(most, nvfp4_global(as_float(global)));
          return Scale<uint8_t, Times>{static_cast<uint8_t>(block.scale), block.scaled};
        },
        [](const Vector& v, auto s) { return e2m1_codes<D>(v, s.scaled); });
  });
}

// Byte scales [rows, columns] laid out, where padding is `padding`.
Bytes laid_out(ByteScales layout, const Bytes& scales, uint8_t padding) {
  const uint64_t rows = scales.shape(0), columns = scales.shape(1);
  Bytes out(static_cast<py::ssize_t>(byte_scales_size(layout, rows, columns)));
  std::memset(out.mutable_data(), padding, out.size());
  for (uint64_t row = 0; row < rows; ++row) {
    for (uint64_t column = 0; column < columns; ++column) {
      out.mutable_at(byte_scale_at(layout, row, column, columns)) = scales.data()[row * columns + column];
    }
  }
  return out;
}

Bytes packed(const Bytes& scales, uint8_t padding) {
  const uint64_t rows = scales.shape(0), columns = scales.shape(1);
  Bytes out(static_cast<py::ssize_t>(packed_scales_size(rows, columns)));
  std::memset(out.mutable_data(), padding, out.size());
  for (uint64_t row = 0; row < rows; ++row) {
    for (uint64_t column = 0; column < columns; ++column) {
      out.mutable_at(packed_scale_at(rows, row, column)) = scales.data()[row * columns + column];
    }
  }
  return out;
}

// How often each byte of a tensor of byte scales is stored to by the launch of rows [first, first + rows) of a call of `call_rows`,
// when so many threads pad it.
py::array_t<uint32_t> padded(bool in_tiles, uint32_t call_rows, uint32_t columns, uint32_t first, uint32_t rows,
                             uint32_t workers) {
  namespace epilogues = mnnvl_ar::epilogues;
  using epilogues::ScaleOrder;
  const uint64_t size = in_tiles ? byte_scales_size(ByteScales::swizzled_128x4, call_rows, columns)
                                 : packed_scales_size(call_rows, columns);
  std::vector<uint8_t> bytes(size);
  const ScaleOrder order = in_tiles ? ScaleOrder::tiles : ScaleOrder::aligned_columns;
  const epilogues::BlockScales scales(bytes.data(), order, true, call_rows, columns);
  Tensors tensors{};
  tensors.tokens = rows, tensors.first_token = first, tensors.call_tokens = call_rows;
  py::array_t<uint32_t> counts(static_cast<py::ssize_t>(size));
  std::fill_n(counts.mutable_data(), size, 0);
  for (uint32_t worker = 0; worker < workers; ++worker) {
    std::fill(bytes.begin(), bytes.end(), 1);
    epilogues::pad_scales(scales, tensors, worker, workers);
    for (uint64_t i = 0; i < size; ++i) counts.mutable_data()[i] += bytes[i] == 0;
  }
  return counts;
}

}  // namespace

void bind_quantised(py::module_& m) {
  m.def("e4m3", of_words(e4m3_of_bits));
  m.def("e2m1", of_words(e2m1_of_bits));
  m.def("e8m0_up", of_words(e8m0_up_of_bits));
  m.def("e4m3_value", fp32_of_words(e4m3_value));
  m.def("divide", [](const Words& a, const Words& b) {
    Words quotients(a.size());
    if (a.size() != b.size()) throw std::invalid_argument("sizes differ");
    for (py::ssize_t i = 0; i < a.size(); ++i) {
      quotients.mutable_data()[i] = as_bits(divide(as_float(a.data()[i]), as_float(b.data()[i])));
    }
    return quotients;
  });
  m.def("token_scale", fp32_of_words(token_scale));
  m.def("group_scale", fp32_of_words(group_scale));
  m.def("group_scale_power", fp32_of_words(group_scale_power));
  m.def("group_scale_e8m0", of_words(group_scale_e8m0));
  m.def("mxfp8_scale", of_words(mxfp8_scale));

  m.def("static_fp8", &static_codes);
  m.def("per_token_fp8", &per_token);
  m.def("per_token_group_fp8", &per_group, py::arg("dtype"), py::arg("norm"), py::arg("power"));
  m.def("group_bytes", &group_bytes);
  m.def("mxfp8", &mxfp8);
  m.def("nvfp4", &nvfp4);

  m.def("swizzled", [](const Bytes& s, uint8_t padding) { return laid_out(ByteScales::swizzled_128x4, s, padding); });
  m.def("linear", [](const Bytes& s, uint8_t padding) { return laid_out(ByteScales::linear, s, padding); });
  m.def("packed", &packed);
  m.def("padded", &padded);
  m.def("tma_stride", &tma_stride);
}
