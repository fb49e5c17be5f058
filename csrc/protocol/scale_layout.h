// Where the scale of a group or block stands in its tensor, for each layout that a consumer reads.
//
// Contract
//   * `row` is of the whole call, of `rows`; `column` counts groups or blocks along the row, of `columns`.
//   * Byte scales (e8m0, e4m3): linear, or in tiles of 128 rows by 4 columns that stand row by row, tensor cores' order. The latter
//     covers whole tiles; what lies behind the last row or column is to be 0.
//   * Packed e8m0: four columns to an int32, the first in the lowest byte; words of a column stand together, and columns a multiple
//     of four words apart. The last column ends with the last row.
//   * fp32 scales: row by row, or column by column, `stride` apart.
#pragma once

#include <cstdint>

#include "protocol/portable.h"

namespace mnnvl_ar::protocol {

MNNVL_AR_HD constexpr uint64_t align_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

enum class ByteScales : uint32_t {
  swizzled_128x4 = 0,
  linear = 2
};  // FlashInfer's numbers; its 1, tiles of 8 rows, is not built

MNNVL_AR_HD constexpr uint64_t byte_scales_size(ByteScales layout, uint64_t rows, uint64_t columns) {
  return layout == ByteScales::linear ? rows * columns : align_up(rows, 128) * align_up(columns, 4);
}

// `tiles`: of a row.
template <class Number>
MNNVL_AR_HD constexpr Number tiled_scale_at(Number row, Number column, Number tiles) {
  return (row / 128 * tiles + column / 4) * 512 + row % 32 * 16 + row % 128 / 32 * 4 + column % 4;
}

MNNVL_AR_HD constexpr uint64_t byte_scale_at(ByteScales layout, uint64_t row, uint64_t column, uint64_t columns) {
  if (layout == ByteScales::linear) return row * columns + column;
  return tiled_scale_at(row, column, align_up(columns, 4) / 4);
}

// Words from one column to the next, of packed e8m0 and of fp32 that TMA reads: 16 bytes apart or a multiple.
MNNVL_AR_HD constexpr uint64_t tma_stride(uint64_t rows) { return align_up(rows, 4); }

// In bytes.
MNNVL_AR_HD constexpr uint64_t packed_scales_size(uint64_t rows, uint64_t columns) {
  return rows == 0 || columns == 0 ? 0 : ((align_up(columns, 4) / 4 - 1) * tma_stride(rows) + rows) * 4;
}

MNNVL_AR_HD constexpr uint64_t packed_scale_at(uint64_t rows, uint64_t row, uint64_t column) {
  return (column / 4 * tma_stride(rows) + row) * 4 + column % 4;
}

// In elements; `stride` is rows, or tma_stride(rows).
MNNVL_AR_HD constexpr uint64_t column_major_at(uint64_t stride, uint64_t row, uint64_t column) {
  return column * stride + row;
}

}  // namespace mnnvl_ar::protocol
