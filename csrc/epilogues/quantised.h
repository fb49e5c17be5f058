// What quantised epilogues have in common: codes of norm, and norm itself, where it is wanted. Rows are of 16 bits.
#pragma once

#include "epilogues/epilogue.h"
#include "protocol/numerics_fp8.h"

namespace mnnvl_ar::epilogues {

struct QuantisedArguments : NormArguments {
  void* norm;   // like x, or null
  void* quant;  // codes of the whole call

  uint32_t variant() const { return NormArguments::variant() | (norm != nullptr ? protocol::kNormToo : 0); }

  QuantisedArguments from(uint64_t bytes) const {
    return {NormArguments::from(bytes), norm == nullptr ? nullptr : at(norm, bytes), quant};
  }
};

struct Quantised {
  static constexpr bool kNormed = true;
  static constexpr bool kTakesFp32 = false;

  template <class D>
  static MNNVL_AR_HD uint32_t measure(const Vector& norm) {
    return protocol::largest<D>(norm);
  }
};

// In the whole call.
MNNVL_AR_HD uint64_t row_of_call(const Tensors& tensors, Place place) {
  return uint64_t{tensors.first_token} + place.row;
}

// `codes`: of one vector, an integer.
template <class Codes>
MNNVL_AR_HD void store_quantised(const QuantisedArguments& a, const Tensors& tensors, Place place, const Vector& norm,
                                 Codes codes) {
  if (a.norm != nullptr) store16(at(a.norm, place.offset), norm);
  store_word(at(a.quant, (row_of_call(tensors, place) * tensors.vectors + place.vector) * sizeof(Codes)), codes);
}

// e4m3 codes of a vector.
template <class D, class Scaled>
MNNVL_AR_HD uint64_t fp8_codes(const Vector& norm, Scaled scaled) {
  const protocol::Codes8 codes = protocol::e4m3_codes<D>(norm, scaled);
  return codes.word[0] | uint64_t{codes.word[1]} << 32;
}

}  // namespace mnnvl_ar::epilogues
