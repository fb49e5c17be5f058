// all_reduce_rms_norm_static_fp8: norm as e4m3 by one scale that lies in device memory; norm itself too, where it is wanted.
//
// Outputs, beside residual_out:
//   * quant: [call tokens, hidden] bytes, e4m3(norm * (1 / scale)): norm is about code * scale;
//   * norm: like x, or null.
#pragma once

#include "epilogues/list.h"
#include "epilogues/quantised.h"

namespace mnnvl_ar::epilogues {

struct StaticFp8 : Quantised {
  static constexpr protocol::Op kOp = protocol::Op::all_reduce_rms_norm_static_fp8;
  static constexpr MostOver kMostOver = MostOver::nothing;

  struct Arguments : QuantisedArguments {
    const float* scale;  // one, on the device

    Arguments from(uint64_t bytes) const { return {QuantisedArguments::from(bytes), scale}; }
  };

  struct PerCall {
    protocol::Times scaled;
  };
  static MNNVL_AR_HD PerCall prepare(const Arguments& a) { return {protocol::static_fp8(load_word<float>(a.scale))}; }

  template <class D>
  static MNNVL_AR_HD void store(const Arguments& a, PerCall per_call, const Tensors& tensors, Place place,
                                const Vector& norm, uint32_t) {
    store_quantised(a, tensors, place, norm, fp8_codes<D>(norm, per_call.scaled));
  }
};

}  // namespace mnnvl_ar::epilogues
