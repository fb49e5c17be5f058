// What ops of epilogues/block_scaled.h share: the tensors of scales that their consumers take, checked or allocated.
#pragma once

#include <algorithm>
#include <vector>

#include "epilogues/block_scaled.h"
#include "torch/quantised.h"
#include "torch/run.h"

namespace mnnvl_ar {

using epilogues::BlockFormat, epilogues::BlockScaled, epilogues::ScaleOrder;

// x as rows of 16 bits and of whole blocks.
inline Agreement check_blocks(const Tensor& x, BlockFormat format) {
  const Agreement a = check_halves(x);
  const int64_t block = int64_t{8} << epilogues::block_shift(format);
  STD_TORCH_CHECK(a.hidden % block == 0, "x: rows of ", a.hidden, " elements, wanted a multiple of ", block);
  return a;
}

inline int64_t blocks_of(const Agreement& a, BlockFormat format) {
  return a.shape.vectors >> epilogues::block_shift(format);
}

struct Scales {
  Wanted wanted;
  ScaleOrder order;
};

// ---- one byte a block: mxfp8 (uint8) and nvfp4 (float8_e4m3fn)

inline Scales byte_scales(const Agreement& a, BlockFormat format, int64_t layout) {
  STD_TORCH_CHECK(layout == 0 || layout == 2, "layout: is ", layout, ", wanted 0 (tiles of 128x4) or 2 (linear)");
  const auto bytes = protocol::byte_scales_size(static_cast<protocol::ByteScales>(layout), a.shape.tokens,
                                                static_cast<uint64_t>(blocks_of(a, format)));
  const int32_t dtype = format == BlockFormat::nvfp4 ? aoti_torch_dtype_float8_e4m3fn() : aoti_torch_dtype_uint8();
  return {{"scale_out", dtype, {static_cast<int64_t>(bytes)}}, layout == 0 ? ScaleOrder::tiles : ScaleOrder::rows};
}

// Of any shape, as long as it has these bytes.
inline Scales check_byte_scales(const Agreement& a, BlockFormat format, int64_t layout, const Tensor& scale_out) {
  Scales scales = byte_scales(a, format, layout);
  STD_TORCH_CHECK(scale_out.numel() == scales.wanted.sizes[0], "scale_out: has ", scale_out.numel(),
                  " elements, wanted ", scales.wanted.sizes[0]);
  const auto sizes = scale_out.sizes();
  scales.wanted.sizes = {sizes.begin(), sizes.end()};
  check_is(a, scale_out, scales.wanted);
  return scales;
}

// ---- groups of 128: fp32, or exponents packed in fours

inline BlockFormat group_format(int64_t scales) {
  check_choice(scales, 0, 2, "scales", "0 (fp32), 1 (powers of two) or 2 (ue8m0, packed)");
  return static_cast<BlockFormat>(scales);
}

inline Scales group_scales(const Agreement& a, BlockFormat format, ScaleOrder order) {
  const int64_t rows = a.shape.tokens, groups = blocks_of(a, format);
  const auto aligned = static_cast<int64_t>(protocol::tma_stride(static_cast<uint64_t>(rows)));
  if (format == BlockFormat::group_ue8m0) {
    return {{"scale_out", aoti_torch_dtype_int32(), {rows, (groups + 3) / 4}, 4, {1, aligned}}, order};
  }
  const std::vector<int64_t> strides[] = {{groups, 1}, {1, rows}, {1, aligned}};
  Wanted wanted{"scale_out", aoti_torch_dtype_float32(), {rows, groups}, 4, strides[static_cast<int>(order)]};
  // Ranks compare orders. Those that are the same memory are one, or who asks for a layout would differ from who brings a tensor.
  if (groups == 1 || (order == ScaleOrder::columns && rows == 1)) order = ScaleOrder::rows;
  if (order == ScaleOrder::columns && rows == aligned) order = ScaleOrder::aligned_columns;
  return {std::move(wanted), order};
}

inline Scales group_scales(const Agreement& a, BlockFormat format, int64_t layout) {
  check_choice(layout, -1, 2, "layout", "0 (row-major), 1 (column-major), 2 (TMA-aligned) or -1 (the first there is)");
  const bool is_packed = format == BlockFormat::group_ue8m0;
  STD_TORCH_CHECK(!is_packed || layout == -1 || layout == 2, "layout: is ", layout,
                  ", wanted 2 (TMA-aligned), the only one of packed scales");
  return group_scales(a, format,
                      is_packed ? ScaleOrder::aligned_columns : static_cast<ScaleOrder>(std::max<int64_t>(0, layout)));
}

// The layout is the one that it has the strides of.
inline Scales check_group_scales(const Agreement& a, BlockFormat format, const Tensor& scale_out) {
  Scales scales = group_scales(a, format, ScaleOrder::aligned_columns);
  if (format != BlockFormat::group_ue8m0) {
    for (ScaleOrder order : {ScaleOrder::columns, ScaleOrder::rows}) {
      const Scales other = group_scales(a, format, order);
      if (has_strides(scale_out, other.wanted.strides)) scales = other;
    }
    scales.wanted.or_else = ", or column-major without padding, or row-major";
  }
  check_is(a, scale_out, scales.wanted);
  return scales;
}

// As the epilogue is given them.
inline epilogues::BlockScales placed(const Agreement& a, BlockFormat format, const Scales& scales,
                                     const Tensor& tensor) {
  const bool of_bytes = scales.wanted.dtype != aoti_torch_dtype_float32();
  const auto columns = static_cast<uint32_t>(blocks_of(a, format));
  const uint64_t bytes = protocol::align_up(a.shape.tokens, 128) * protocol::align_up(columns, 4) * (of_bytes ? 1 : 4);
  STD_TORCH_CHECK(bytes <= UINT32_MAX, "x: scales of ", a.shape.tokens, " rows take up to ", bytes,
                  " bytes, wanted less than 4 GiB");
  return {tensor.data_ptr(), scales.order, of_bytes, a.shape.tokens, columns};
}

}  // namespace mnnvl_ar
