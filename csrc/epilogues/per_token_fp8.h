// all_reduce_rms_norm_per_token_fp8: norm as e4m3 with a scale for each row; norm itself too, where it is wanted.
//
// Outputs, beside residual_out:
//   * scale: [call tokens] fp32, of the row's largest magnitude (numerics_fp8.h);
//   * quant: [call tokens, hidden] bytes, e4m3(norm / scale): norm is about code * scale;
//   * norm: like x, or null.
#pragma once

#include "epilogues/epilogue.h"
#include "epilogues/list.h"

namespace mnnvl_ar::epilogues {

struct PerTokenFp8 {
  static constexpr protocol::Op kOp = protocol::Op::all_reduce_rms_norm_per_token_fp8;
  static constexpr bool kNormed = true;
  static constexpr bool kTakesFp32 = false;
  static constexpr bool kNeedsMost = true;

  struct Arguments : NormArguments {
    void* norm;   // like x, or null
    void* quant;  // of the whole call, as `scale`
    void* scale;

    Arguments from(uint64_t bytes) const {
      return {NormArguments::from(bytes), norm == nullptr ? nullptr : static_cast<uint8_t*>(norm) + bytes, quant,
              scale};
    }
  };

  using PerCall = Nothing;
  static MNNVL_AR_HD PerCall prepare(const Arguments&) { return {}; }

  template <class D>
  static MNNVL_AR_HD uint32_t measure(const Vector& norm) {
    return protocol::largest<D>(norm);
  }

  template <class D>
  static MNNVL_AR_HD void store(const Arguments& a, PerCall, const Tensors& tensors, Place place, const Vector& norm,
                                uint32_t most) {
    if (a.norm != nullptr) store16(at(a.norm, place.offset), norm);
    const uint64_t row = uint64_t{tensors.first_token} + place.row;
    const float scale = protocol::token_scale(most);
    store_codes(at(a.quant, (row * tensors.vectors + place.vector) * sizeof(protocol::Codes8)),
                protocol::e4m3_codes<D>(norm, protocol::Over{scale}));
    if (place.vector == 0) store_word(at(a.scale, row * 4), scale);
  }
};

}  // namespace mnnvl_ar::epilogues
