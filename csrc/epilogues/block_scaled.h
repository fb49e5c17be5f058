// all_reduce_rms_norm_per_token_group_fp8, _mxfp8 and _nvfp4: norm as codes with a scale for each block of neighbouring elements; norm
// itself too, where it is wanted. One set of kernels for all formats, which differ in a few instructions: one each would take
// five times as long to compile and to load (decision 57).
//
// Outputs, beside residual_out:
//   * quant: [call tokens, hidden] codes, of a byte or, in NVFP4, of half a byte;
//   * scale: one for each block, in any of the layouts that the format has (block_scales.h);
//   * norm: like x, or null.
// What codes and scales are, and which is multiplied by which, is in numerics_fp8.h and numerics_fp4.h.
#pragma once

#include "epilogues/block_scales.h"
#include "epilogues/quantised.h"
#include "protocol/numerics_fp4.h"

namespace mnnvl_ar::epilogues {

enum class BlockFormat : uint32_t {
  group,               // e4m3; 128 elements; fp32
  group_power_of_two,  // the same; a power of two as fp32
  group_ue8m0,         // the same; its exponent, packed in fours
  mxfp8,               // e4m3; 32 elements; an exponent
  nvfp4,               // e2m1; 16 elements; e4m3, under a scale of the whole tensor
};

// Vectors of a block are 2 to the power of this; elements are eight times as many.
MNNVL_AR_HD constexpr uint32_t block_shift(BlockFormat format) {
  return format == BlockFormat::nvfp4 ? 1 : format == BlockFormat::mxfp8 ? 2 : 4;
}

// A format, a fact at a time. Kernels ask for those: a choice by the format itself becomes a jump by a table, which the check of rule
// R1 cannot follow (tests/common/sass.py).
struct BlockFacts {
  uint32_t shift;
  bool is_fp4, is_mx;
  bool divides;  // elements by the scale; else they are multiplied by a factor

  constexpr BlockFacts(BlockFormat format)
      : shift(block_shift(format)),
        is_fp4(format == BlockFormat::nvfp4),
        is_mx(format == BlockFormat::mxfp8),
        divides(format == BlockFormat::group) {}
};

struct BlockScaled : Quantised {
  static constexpr MostOver kMostOver = MostOver::block;

  struct Arguments : QuantisedArguments {
    BlockFacts format;
    BlockScales scale;    // of the whole call
    const float* global;  // NVFP4's: one, on the device

    // Of groups' scales, what they are: fp32, powers of two as fp32, or exponents. Other formats are ops of their own.
    uint32_t variant() const {
      const bool is_group = !format.is_fp4 && !format.is_mx;
      const uint32_t kind = !is_group || format.divides ? 0 : scale.of_bytes ? 2 : 1;
      return QuantisedArguments::variant() | static_cast<uint32_t>(scale.order) << protocol::kScaleOrderAt |
             kind << protocol::kScaleKindAt;
    }

    Arguments from(uint64_t bytes) const { return {QuantisedArguments::from(bytes), format, scale, global}; }
  };

  struct PerCall {
    protocol::Nvfp4Global global;
  };
  static MNNVL_AR_HD PerCall prepare(const Arguments& a) {
    if (!a.format.is_fp4) return {};
    return {protocol::nvfp4_global(load_word<float>(a.global))};
  }

  static MNNVL_AR_HD uint32_t block_vectors(const Arguments& a) { return 1u << a.format.shift; }

  static MNNVL_AR_HD void pad(const Arguments& a, const Tensors& tensors, uint32_t worker, uint32_t workers) {
    pad_scales(a.scale, tensors, worker, workers);
  }

  template <class D>
  static MNNVL_AR_HD void store(const Arguments& a, PerCall per_call, const Tensors& tensors, Place place,
                                const Vector& norm, uint32_t most) {
    const Scale scale = scale_of(a, per_call, most);
    if (a.format.is_fp4) {
      store_quantised(a, tensors, place, norm, protocol::e2m1_codes<D>(norm, {scale.number}));
    } else if (a.format.divides) {
      store_quantised(a, tensors, place, norm, fp8_codes<D>(norm, protocol::Over{scale.number}));
    } else {
      store_quantised(a, tensors, place, norm, fp8_codes<D>(norm, protocol::Times{scale.number}));
    }
    const uint32_t column = place.vector >> a.format.shift;
    if (column << a.format.shift != place.vector) return;
    store_scale(a.scale, scale_offset(a.scale, tensors.first_token + place.row, column), scale.stored);
  }

 private:
  struct Scale {
    uint32_t stored;
    float number;  // by which elements are multiplied, or divided
  };

  static MNNVL_AR_HD Scale scale_of(const Arguments& a, PerCall per_call, uint32_t most) {
    if (a.format.is_fp4) {
      const protocol::Nvfp4Block block = protocol::nvfp4_block(most, per_call.global);
      return {block.scale, block.scaled.factor};
    }
    if (a.format.is_mx) {
      const uint32_t scale = protocol::mxfp8_scale(most);
      return {scale, protocol::mxfp8_factor(scale).factor};
    }
    if (a.format.divides) {
      const float scale = protocol::group_scale(most);
      return {protocol::as_bits(scale), scale};
    }
    return {a.scale.of_bytes ? protocol::group_scale_e8m0(most) : protocol::as_bits(protocol::group_scale_power(most)),
            protocol::group_power_factor(most).factor};
  }
};

}  // namespace mnnvl_ar::epilogues
