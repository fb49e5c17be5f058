// Test builds only: an epilogue whose outputs are not like x, with a second reduction over the row and an input of one
// element. It proves the contract of epilogue.h in every strategy, form and transport; it is of no other use.
//
// Outputs, beside residual_out and instead of norm:
//   * high: [tokens, hidden] bytes, the upper eight bits of each element of norm;
//   * peak: [call tokens] fp32, the largest magnitude of norm in the row, times `scale`; NaN if there is one.
#pragma once

#include "epilogues/epilogue.h"
#include "epilogues/list.h"

#ifdef MNNVL_AR_TEST_BUILD

namespace mnnvl_ar::epilogues {

struct RowPeak {
  static constexpr protocol::Op kOp = protocol::Op::row_peak;
  static constexpr bool kNormed = true;
  static constexpr bool kTakesFp32 = true;
  static constexpr MostOver kMostOver = MostOver::row;

  struct Arguments : NormArguments {
    const float* scale;  // one, on the device
    void* high;          // of the whole call, as `peak`
    void* peak;

    Arguments from(uint64_t bytes) const { return {NormArguments::from(bytes), scale, high, peak}; }
  };

  struct PerCall {
    float scale;
  };
  static MNNVL_AR_HD PerCall prepare(const Arguments& a) { return {load_word<float>(a.scale)}; }

  template <class D>
  static MNNVL_AR_HD uint32_t measure(const Vector& norm) {
    uint32_t most = 0;
    MNNVL_AR_UNROLL
    for (int i = 0; i < D::kPerVector; ++i) {
      const uint32_t magnitude = protocol::as_bits(D::load(norm, i)) & 0x7fffffffu;
      most = magnitude > most ? magnitude : most;
    }
    return most;
  }

  template <class D>
  static MNNVL_AR_HD void store(const Arguments& a, PerCall per_call, const Tensors& tensors, Place place,
                                const Vector& norm, uint32_t most) {
    const uint64_t row = uint64_t{tensors.first_token} + place.row;
    uint32_t bytes[2] = {};
    MNNVL_AR_UNROLL
    for (int i = 0; i < D::kPerVector; ++i) {
      bytes[i / 4] |= protocol::as_bits(D::load(norm, i)) >> 24 << i % 4 * 8;
    }
    uint8_t* const high = at(a.high, (row * tensors.vectors + place.vector) * D::kPerVector);
    MNNVL_AR_UNROLL
    for (int i = 0; i < D::kPerVector / 4; ++i) store_word(high + i * 4, bytes[i]);
    if (place.vector == 0) store_word(at(a.peak, row * 4), protocol::mul(protocol::as_float(most), per_call.scale));
  }
};

}  // namespace mnnvl_ar::epilogues

#endif
