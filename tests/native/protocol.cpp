// csrc/protocol, and of csrc/launch the pace of one-shot and the share of a device, for the unit tests, as a Python module. Never
// imported by mnnvl_ar.
//
// Contract
//   * Every function is a thin shell around one of csrc/protocol; nothing of the protocol is written again here, but for
//     the one negative control, `flushing`.
//   * Arrays are NumPy's. Floating-point values cross as bits (uint32), so that no conversion touches a NaN or a zero.
//   * Vectors are uint32 [n, 4]. dtype is "bfloat16", "float16" or "float32".
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "arrays.h"
#include "launch/hints.h"
#include "launch/pace.h"
#include "launch/processors.h"
#include "protocol/layout.h"
#include "protocol/nearest_float.h"
#include "protocol/numerics.h"
#include "protocol/numerics_root.h"
#include "protocol/pieces.h"
#include "protocol/ring.h"
#include "protocol/sentinel.h"
#include "protocol/signature.h"
#include "quantised.h"

namespace py = pybind11;
using namespace mnnvl_ar::protocol;

namespace {

using Quad = std::array<uint32_t, 4>;

Vector vector_of(const Quad& q) { return Vector{{q[0], q[1], q[2], q[3]}}; }
Quad quad_of(const Vector& v) { return {v.word[0], v.word[1], v.word[2], v.word[3]}; }

Vector vector_at(const uint32_t* words) {
  Vector v;
  std::memcpy(&v, words, sizeof v);
  return v;
}
void put(uint32_t* words, const Vector& v) { std::memcpy(words, &v, sizeof v); }

// The size of the leading dimensions of an array whose last ones are `last`.
py::ssize_t count(const py::array& a, std::initializer_list<py::ssize_t> last) {
  const auto n = static_cast<py::ssize_t>(last.size());
  if (a.ndim() < n) throw std::invalid_argument("too few dimensions");
  py::ssize_t i = a.ndim() - n, leading = 1;
  for (py::ssize_t k = 0; k < i; ++k) leading *= a.shape(k);
  for (py::ssize_t want : last) {
    if (a.shape(i++) != want) throw std::invalid_argument("wrong size of a trailing dimension");
  }
  return leading;
}

// What `work<D>` does for the dtype named.
template <class Work>
auto with(const std::string& dtype, Work work) {
  if (dtype == "bfloat16") return work(Bfloat16{});
  if (dtype == "float16") return work(Float16{});
  if (dtype == "float32") return work(Float32{});
  throw std::invalid_argument("dtype: " + dtype);
}

// ---- sentinel

// The compare that FlashInfer's kernel waited by, `x == 0 && signbit(x)` compiled with flushing to zero, on bits: a
// flushed compare takes every value of exponent 0 for a zero.
bool flushing(const Vector& v) {
  for (uint32_t word : v.word) {
    const bool is_zero = (word & 0x7f800000u) == 0;
    if (is_zero && word >> 31) return false;
  }
  return true;
}

bool arrived_by(const std::string& compare, const Vector& v) {
  if (compare == "integer") return has_arrived(v);
  if (compare == "flushing") return flushing(v);
  throw std::invalid_argument("compare: " + compare);
}

// What is on the wire of each vector, and whether it is taken for data there.
std::pair<Words, Array<bool>> wire(const std::string& compare, bool sanitized, const Words& vectors) {
  const py::ssize_t n = count(vectors, {4});
  Words sent({n, py::ssize_t{4}});
  Array<bool> arrived(n);
  for (py::ssize_t i = 0; i < n; ++i) {
    const Vector v = vector_at(vectors.data() + 4 * i), s = sanitized ? sanitize(v) : v;
    put(sent.mutable_data() + 4 * i, s);
    arrived.mutable_data()[i] = arrived_by(compare, s);
  }
  return {sent, arrived};
}

// Words first, ..., last in one position of a vector whose other words are `others`: how many do not arrive, how many
// arrive as something other than what was sent up to the sign of a zero (two halves or one word), and the first of
// either.
std::tuple<uint64_t, uint64_t, uint32_t> sweep(const std::string& compare, bool halves, uint32_t position,
                                               uint64_t first, uint64_t last, uint32_t others) {
  const bool integer = compare == "integer";
  uint64_t lost = 0, changed = 0;
  uint32_t example = 0;
  for (uint64_t i = first; i <= last; ++i) {
    const auto word = static_cast<uint32_t>(i);
    Vector v{{others, others, others, others}};
    v.word[position % 4] = word;
    const Vector s = sanitize(v);
    const bool is_lost = !(integer ? has_arrived(s) : flushing(s));
    const uint32_t differs = s.word[position % 4] ^ word;
    const uint32_t signs = halves ? (word & 0x7fffu ? 0 : 0x8000u) | (word & 0x7fff0000u ? 0 : 0x80000000u)
                                  : (word & 0x7fffffffu ? 0 : 0x80000000u);
    const bool is_changed = (differs & ~signs) != 0;
    if ((is_lost || is_changed) && lost + changed == 0) example = word;
    lost += is_lost;
    changed += is_changed;
  }
  return {lost, changed, example};
}

// ---- layout

// Positions of all (source, token, vector) that come to `receiver`, in rank order: of all ranks where its own come too, or of all
// others. Of all (source, token, owned column) with the column's owner; of all (token, vector).
Array<uint64_t> one_shot_positions(uint32_t ranks, uint32_t tokens, uint32_t vectors, uint32_t receiver, bool own_too) {
  const Shape shape{ranks, tokens, vectors, own_too};
  Array<uint64_t> positions({ranks - !own_too, tokens, vectors});
  uint64_t* out = positions.mutable_data();
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    if (rank == receiver && !own_too) continue;
    for (uint32_t token = 0; token < tokens; ++token) {
      for (uint32_t v = 0; v < vectors; ++v) {
        *out++ = one_shot_position(shape, source_of(shape, rank, receiver), token, v);
      }
    }
  }
  return positions;
}

Array<uint64_t> scatter_positions(uint32_t ranks, uint32_t tokens, uint32_t vectors, uint32_t owner) {
  const Shape shape{ranks, tokens, vectors};
  const uint32_t columns = columns_of(shape, owner);
  Array<uint64_t> positions({ranks, tokens, columns});
  uint64_t* out = positions.mutable_data();
  for (uint32_t source = 0; source < ranks; ++source) {
    for (uint32_t token = 0; token < tokens; ++token) {
      for (uint32_t c = 0; c < columns; ++c) *out++ = scatter_position(shape, source, token, c);
    }
  }
  return positions;
}

Array<uint64_t> gather_positions(uint32_t ranks, uint32_t tokens, uint32_t vectors) {
  const Shape shape{ranks, tokens, vectors};
  Array<uint64_t> positions({tokens, vectors});
  uint64_t* out = positions.mutable_data();
  for (uint32_t token = 0; token < tokens; ++token) {
    for (uint32_t v = 0; v < vectors; ++v) *out++ = gather_position(shape, token, v);
  }
  return positions;
}

// ---- numerics

Halves round_halves(const std::string& dtype, const Words& bits) {
  Halves result(bits.size());
  const auto all = [&](auto round) {
    for (py::ssize_t i = 0; i < bits.size(); ++i) {
      result.mutable_data()[i] = static_cast<uint16_t>(round(as_float(bits.data()[i])));
    }
  };
  if (dtype == "bfloat16") {
    all([](float value) { return Bfloat16::round(value); });
  } else if (dtype == "float16") {
    all([](float value) { return Float16::round(value); });
  } else {
    throw std::invalid_argument("dtype: " + dtype);
  }
  return result;
}

// Elements of vectors [n, 4] as fp32 bits [n, kPerVector].
Words unpack(const std::string& dtype, const Words& vectors) {
  const py::ssize_t n = count(vectors, {4});
  return with(dtype, [&](auto d) {
    using D = decltype(d);
    Words result({n, py::ssize_t{D::kPerVector}});
    for (py::ssize_t i = 0; i < n; ++i) {
      const Vector v = vector_at(vectors.data() + 4 * i);
      for (int j = 0; j < D::kPerVector; ++j) result.mutable_data()[i * D::kPerVector + j] = as_bits(D::load(v, j));
    }
    return result;
  });
}

// The inverse, rounding: [n, kPerVector] -> [n, 4].
Words pack_rows(const std::string& dtype, const Words& values) {
  return with(dtype, [&](auto d) {
    using D = decltype(d);
    const py::ssize_t n = count(values, {D::kPerVector});
    Words result({n, py::ssize_t{4}});
    for (py::ssize_t i = 0; i < n; ++i) {
      float value[D::kPerVector];
      for (int j = 0; j < D::kPerVector; ++j) value[j] = as_float(values.data()[i * D::kPerVector + j]);
      put(result.mutable_data() + 4 * i, pack<D>(value));
    }
    return result;
  });
}

// Step 1 before it is rounded: vectors [ranks, n, 4] -> fp32 bits [n, kPerVector].
Words sum_of_ranks(const std::string& dtype, const Words& vectors) {
  if (vectors.ndim() != 3 || vectors.shape(2) != 4) throw std::invalid_argument("vectors: [ranks, n, 4] wanted");
  const py::ssize_t ranks = vectors.shape(0), n = vectors.shape(1);
  return with(dtype, [&](auto d) {
    using D = decltype(d);
    Words result({n, py::ssize_t{D::kPerVector}});
    for (py::ssize_t i = 0; i < n; ++i) {
      float sum[D::kPerVector] = {};
      for (py::ssize_t rank = 0; rank < ranks; ++rank)
        accumulate<D>(sum, vector_at(vectors.data() + 4 * (rank * n + i)));
      for (int j = 0; j < D::kPerVector; ++j) result.mutable_data()[i * D::kPerVector + j] = as_bits(sum[j]);
    }
    return result;
  });
}

Words add_residuals(const std::string& dtype, const Words& s, const Words& residual) {
  const py::ssize_t n = count(s, {4});
  if (count(residual, {4}) != n) throw std::invalid_argument("residual: another size than s");
  return with(dtype, [&](auto d) {
    Words result({n, py::ssize_t{4}});
    for (py::ssize_t i = 0; i < n; ++i) {
      put(result.mutable_data() + 4 * i,
          add_residual<decltype(d)>(vector_at(s.data() + 4 * i), vector_at(residual.data() + 4 * i)));
    }
    return result;
  });
}

Words square_sums(const std::string& dtype, const Words& z) {
  const py::ssize_t n = count(z, {4});
  return with(dtype, [&](auto d) {
    Words result(n);
    for (py::ssize_t i = 0; i < n; ++i) {
      result.mutable_data()[i] = as_bits(square_sum<decltype(d)>(vector_at(z.data() + 4 * i)));
    }
    return result;
  });
}

Words reduce_groups(const Words& lanes) {
  const py::ssize_t n = count(lanes, {kGroup});
  Words result(n);
  for (py::ssize_t i = 0; i < n; ++i) {
    float lane[kGroup];
    for (int j = 0; j < kGroup; ++j) lane[j] = as_float(lanes.data()[i * kGroup + j]);
    result.mutable_data()[i] = as_bits(reduce_group(lane));
  }
  return result;
}

Words reciprocal_roots(const Words& square_sums, float hidden, float eps) {
  Words result(square_sums.size());
  for (py::ssize_t i = 0; i < square_sums.size(); ++i) {
    result.mutable_data()[i] = as_bits(reciprocal_root(as_float(square_sums.data()[i]), hidden, eps));
  }
  return result;
}

// Of x and an approximation of 1 / sqrt(x) each: sqrt(x) and, of a root, 1 / root, as kernels compute them. fp32 bits.
Words roots_by(const Words& x, const Words& about) {
  Words result(x.size());
  for (py::ssize_t i = 0; i < x.size(); ++i) {
    result.mutable_data()[i] = as_bits(root_by(as_float(x.data()[i]), as_float(about.data()[i])));
  }
  return result;
}

Words reciprocals_by(const Words& root, const Words& about) {
  Words result(root.size());
  for (py::ssize_t i = 0; i < root.size(); ++i) {
    result.mutable_data()[i] = as_bits(reciprocal_by(as_float(root.data()[i]), as_float(about.data()[i])));
  }
  return result;
}

// Whether kernels take the quick way at all: 1 or 0, of x and of its root.
Words take_quick_root(const Words& x, const Words& root) {
  Words result(x.size());
  for (py::ssize_t i = 0; i < x.size(); ++i) {
    result.mutable_data()[i] = is_moderate(as_float(x.data()[i])) && !is_all_ones(as_float(root.data()[i]));
  }
  return result;
}

// z [n, 4], rstd fp32 bits [n], weight fp32 bits [n, kPerVector] -> [n, 4].
Words normalize_rows(const std::string& dtype, const Words& z, const Words& rstd, const Words& weight,
                     float weight_bias) {
  const py::ssize_t n = count(z, {4});
  return with(dtype, [&](auto d) {
    using D = decltype(d);
    if (rstd.size() != n || count(weight, {D::kPerVector}) != n) throw std::invalid_argument("sizes differ");
    Words result({n, py::ssize_t{4}});
    for (py::ssize_t i = 0; i < n; ++i) {
      float factor[D::kPerVector];
      for (int j = 0; j < D::kPerVector; ++j) factor[j] = as_float(weight.data()[i * D::kPerVector + j]);
      put(result.mutable_data() + 4 * i,
          normalize<D>(vector_at(z.data() + 4 * i), as_float(rstd.data()[i]), factor, weight_bias));
    }
    return result;
  });
}

}  // namespace

PYBIND11_MODULE(_protocol, m) {
  m.doc() = "csrc/protocol, for tests only";

  m.attr("SENTINEL") = kSentinel;
  m.attr("SLOTS") = kSlots;
  m.attr("EPOCHS") = kEpochs;
  m.attr("NO_EPOCH") = kNoEpoch;
  m.attr("MAX_RANKS") = kMaxRanks;
  m.attr("MAX_ROW_VECTORS") = kMaxRowVectors;
  m.attr("VECTOR_BYTES") = kVectorBytes;
  m.attr("STATE_OFFSET") = kStateOffset;
  m.attr("PROGRESS_OFFSET") = kProgressOffset;
  m.attr("PROBE_OFFSET") = kProbeOffset;
  m.attr("CONTROL_BYTES") = kControlBytes;
  m.attr("GROUP") = kGroup;
  m.attr("POISON") = kPoison;

  m.def("next_epoch", &next_epoch);
  m.def("slot_of", &slot_of);
  m.def("slot_to_clear", &slot_to_clear);
  m.attr("MAX_GRID") = kMaxGrid;
  m.def("arrival", &arrival);
  m.def("arrivals", &arrivals);
  m.def("is_one_call", &is_one_call);
  m.def("epoch_distance", &epoch_distance);

  m.def("sanitize", [](uint32_t word) { return sanitize(word); });
  m.def("sanitize", [](const Quad& v) { return quad_of(sanitize(vector_of(v))); });
  m.def("has_arrived", [](const Quad& v) { return has_arrived(vector_of(v)); });
  m.def("sentinel_vector", [] { return quad_of(sentinel_vector()); });
  m.def("wire", &wire, py::arg("compare"), py::arg("sanitized"), py::arg("vectors"));
  m.def("sweep", &sweep, py::arg("compare"), py::arg("halves"), py::arg("position"), py::arg("first"), py::arg("last"),
        py::arg("others"), py::call_guard<py::gil_scoped_release>());

  m.def("slot_offset", &slot_offset);
  m.def("block_bytes", &block_bytes);
  m.def("board_offset", &board_offset);
  const auto shaped = [&m](const char* name, auto function) {
    m.def(name, [function](uint32_t ranks, uint32_t tokens, uint32_t vectors) {
      return function(Shape{ranks, tokens, vectors});
    });
  };
  m.def(
      "one_shot_vectors",
      [](uint32_t ranks, uint32_t tokens, uint32_t vectors, bool own_too) {
        return one_shot_vectors(Shape{ranks, tokens, vectors, own_too});
      },
      py::arg("ranks"), py::arg("tokens"), py::arg("vectors"), py::arg("own_too") = true);
  shaped("two_shot_vectors", &two_shot_vectors);
  shaped("scatter_vectors", &scatter_vectors);
  shaped("owned_columns", &owned_columns);
  m.def("columns_of", [](uint32_t ranks, uint32_t tokens, uint32_t vectors, uint32_t owner) {
    return columns_of(Shape{ranks, tokens, vectors}, owner);
  });
  m.def("one_shot_position", [](std::array<uint32_t, 3> s, uint32_t source, uint32_t token, uint32_t vector) {
    return one_shot_position(Shape{s[0], s[1], s[2]}, source, token, vector);
  });
  m.def("scatter_position", [](std::array<uint32_t, 3> s, uint32_t source, uint32_t token, uint32_t column) {
    return scatter_position(Shape{s[0], s[1], s[2]}, source, token, column);
  });
  m.def("gather_position", [](std::array<uint32_t, 3> s, uint32_t token, uint32_t vector) {
    return gather_position(Shape{s[0], s[1], s[2]}, token, vector);
  });
  m.def("one_shot_positions", &one_shot_positions);
  m.def("scatter_positions", &scatter_positions);
  m.def("gather_positions", &gather_positions);

  m.def("resident_on", &mnnvl_ar::launch::resident_on);
  m.def("spreads_link_traffic", [](int driver_version, uint32_t generation) {
    return mnnvl_ar::launch::spreads_link_traffic(driver_version, generation);
  });
  m.def("pace", [](uint32_t ranks, uint32_t tokens, uint32_t vectors, std::array<uint32_t, 5> link) {
    const auto pace =
        mnnvl_ar::launch::pace_of({ranks, tokens, vectors}, {link[0], link[1], link[2], link[3], link[4]});
    return std::pair(pace.row, pace.first_look);
  });

  m.attr("TAGS") = kTags;
  m.attr("SIGNED_PIECES") = kSignedPieces;
  m.def("describe", [](uint32_t op, uint32_t dtype, uint32_t strategy, uint32_t vectors, uint32_t tag, uint32_t piece,
                       uint32_t variant) {
    return describe(Op{op}, Dtype{dtype}, Strategy{strategy}, vectors, tag, piece, variant);
  });
  m.def("described", [](uint32_t description) {
    return std::array<uint32_t, 7>{static_cast<uint32_t>(op_of(description)),
                                   static_cast<uint32_t>(dtype_of(description)),
                                   static_cast<uint32_t>(strategy_of(description)),
                                   vectors_of(description),
                                   tag_of(description),
                                   piece_of(description),
                                   variant_of(description)};
  });
  m.def("numbers_offset", &numbers_offset);
  m.def("pieces_of", [](uint32_t strategy, uint32_t ranks, uint32_t tokens, uint32_t vectors, uint64_t slot_vectors) {
    const Pieces pieces = pieces_of(Strategy{strategy}, {ranks, tokens, vectors}, slot_vectors);
    return std::make_pair(pieces.rows, pieces.count);
  });
  m.def("signature", [](uint32_t epoch, uint32_t tokens, uint32_t description) {
    return quad_of(signature(epoch, tokens, description));
  });
  m.def("is_signature_of", [](const Quad& v, uint32_t epoch) { return is_signature_of(vector_of(v), epoch); });
  m.def("agrees",
        [](const Quad& v, uint32_t tokens, uint32_t description) { return agrees(vector_of(v), tokens, description); });

  m.def("nearest_float", [](double value) { return as_bits(nearest_float(value)); });
  m.def("round_halves", &round_halves);
  m.def("unpack", &unpack);
  m.def("pack", &pack_rows);
  m.def("sum_of_ranks", &sum_of_ranks);
  m.def("add_residual", &add_residuals);
  m.def("square_sum", &square_sums);
  m.def("reduce_group", &reduce_groups);
  m.def("reciprocal_root", &reciprocal_roots);
  m.def("root_by", &roots_by);
  m.def("reciprocal_by", &reciprocals_by);
  m.def("takes_quick_root", &take_quick_root);
  m.def("normalize", &normalize_rows);

  bind_quantised(m);
}
