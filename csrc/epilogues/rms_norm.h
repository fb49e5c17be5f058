// all_reduce_rms_norm: residual_out = sum + residual, and its RMSNorm in the dtype of x.
#pragma once

#include "epilogues/epilogue.h"
#include "epilogues/list.h"

namespace mnnvl_ar::epilogues {

struct RmsNorm {
  static constexpr protocol::Op kOp = protocol::Op::all_reduce_rms_norm;
  static constexpr bool kNormed = true;
  static constexpr bool kTakesFp32 = true;
  static constexpr MostOver kMostOver = MostOver::nothing;

  struct Arguments : NormArguments {
    void* norm;  // like x

    Arguments from(uint64_t bytes) const { return {NormArguments::from(bytes), static_cast<uint8_t*>(norm) + bytes}; }
  };

  using PerCall = Nothing;
  static MNNVL_AR_HD PerCall prepare(const Arguments&) { return {}; }

  template <class D>
  static MNNVL_AR_HD void store(const Arguments& a, PerCall, const Tensors&, Place place, const Vector& norm,
                                uint32_t) {
    store16(at(a.norm, place.offset), norm);
  }
};

}  // namespace mnnvl_ar::epilogues
