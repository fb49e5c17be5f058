// all_reduce_rms_norm_static_fp8: norm as e4m3 by one scale that lies in device memory; norm itself too, where it is wanted.
//
// Outputs, beside residual_out:
//   * quant: [call tokens, hidden] bytes, e4m3(norm * (1 / scale)): norm is about code * scale;
//   * norm: like x, or null.
#pragma once

#include "epilogues/epilogue.h"
#include "epilogues/list.h"

namespace mnnvl_ar::epilogues {

struct StaticFp8 {
  static constexpr protocol::Op kOp = protocol::Op::all_reduce_rms_norm_static_fp8;
  static constexpr bool kNormed = true;
  static constexpr bool kTakesFp32 = false;
  static constexpr bool kNeedsMost = false;

  struct Arguments : NormArguments {
    const float* scale;  // one, on the device
    void* norm;          // like x, or null
    void* quant;         // of the whole call

    Arguments from(uint64_t bytes) const {
      return {NormArguments::from(bytes), scale, norm == nullptr ? nullptr : static_cast<uint8_t*>(norm) + bytes,
              quant};
    }
  };

  struct PerCall {
    protocol::Times scaled;
  };
  static MNNVL_AR_HD PerCall prepare(const Arguments& a) { return {protocol::static_fp8(load_word<float>(a.scale))}; }

  template <class D>
  static MNNVL_AR_HD void store(const Arguments& a, PerCall per_call, const Tensors& tensors, Place place,
                                const Vector& norm, uint32_t) {
    if (a.norm != nullptr) store16(at(a.norm, place.offset), norm);
    const uint64_t row = uint64_t{tensors.first_token} + place.row;
    store_codes(at(a.quant, (row * tensors.vectors + place.vector) * sizeof(protocol::Codes8)),
                protocol::e4m3_codes<D>(norm, per_call.scaled));
  }
};

}  // namespace mnnvl_ar::epilogues
