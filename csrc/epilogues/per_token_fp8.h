// all_reduce_rms_norm_per_token_fp8: norm as e4m3 with a scale for each row; norm itself too, where it is wanted.
//
// Outputs, beside residual_out:
//   * scale: [call tokens] fp32, of the row's largest magnitude (numerics_fp8.h);
//   * quant: [call tokens, hidden] bytes, e4m3(norm / scale): norm is about code * scale;
//   * norm: like x, or null.
#pragma once

#include "epilogues/list.h"
#include "epilogues/quantised.h"

namespace mnnvl_ar::epilogues {

struct PerTokenFp8 : Quantised {
  static constexpr protocol::Op kOp = protocol::Op::all_reduce_rms_norm_per_token_fp8;
  static constexpr MostOver kMostOver = MostOver::row;

  struct Arguments : QuantisedArguments {
    void* scale;  // of the whole call

    Arguments from(uint64_t bytes) const { return {QuantisedArguments::from(bytes), scale}; }
  };

  using PerCall = Nothing;
  static MNNVL_AR_HD PerCall prepare(const Arguments&) { return {}; }

  template <class D>
  static MNNVL_AR_HD void store(const Arguments& a, PerCall, const Tensors& tensors, Place place, const Vector& norm,
                                uint32_t most) {
    const float scale = protocol::token_scale(most);
    store_quantised(a, tensors, place, norm, fp8_codes<D>(norm, protocol::Over{scale}));
    if (place.vector == 0) store_word(at(a.scale, row_of_call(tensors, place) * 4), scale);
  }
};

}  // namespace mnnvl_ar::epilogues
