// Scales of blocks, each stored where its layout has it (protocol/scale_layout.h), and the padding beside it, which is 0.
//
// Contract
//   * Every byte of the tensor is stored by some vector of the call: a scale by the first vector of its block, and padding by those
//     that stand nearest to it. None is stored twice, and none depends on how the call was cut or spread.
//   * `row` is of the call, of `rows`; `column` is the block's place in the row, of `columns`.
#pragma once

#include "epilogues/epilogue.h"
#include "protocol/scale_layout.h"

namespace mnnvl_ar::epilogues {

// How scales stand in memory.
enum class ScaleOrder : uint32_t {
  rows,             // row by row
  columns,          // column by column, without padding: fp32 only
  aligned_columns,  // column by column, as TMA reads them: fp32, or bytes packed in fours
  tiles,            // 128 rows by 4 columns: bytes only
};

struct BlockScales {
  void* data;
  ScaleOrder order;
  bool of_bytes;  // or of fp32
};

struct ScalePlace {
  uint32_t row, rows;
  uint32_t column, columns;
};

MNNVL_AR_HD uint64_t byte_offset(ScaleOrder order, const ScalePlace& p, uint32_t column) {
  if (order == ScaleOrder::aligned_columns) return protocol::packed_scale_at(p.rows, p.row, column);
  return protocol::byte_scale_at(
      order == ScaleOrder::rows ? protocol::ByteScales::linear : protocol::ByteScales::swizzled_128x4, p.row, column,
      p.columns);
}

// Behind the last row, in the words of this column: of fp32 one for each scale, of bytes one for four.
MNNVL_AR_HD void pad_column(void* data, const ScalePlace& p, uint32_t word_column, uint32_t word_columns) {
  if (p.row + 1 != p.rows || word_column + 1 == word_columns) return;  // the last column ends with the last row
  const uint64_t stride = protocol::tma_stride(p.rows);
  for (uint64_t row = p.rows; row < stride; ++row) {
    store_word(at(data, protocol::column_major_at(stride, row, word_column) * 4), 0u);
  }
}

// By the first vector of a block. `scale`: a byte, or the bits of an fp32.
MNNVL_AR_HD void store_scale(const BlockScales& s, const ScalePlace& p, uint32_t scale) {
  const bool is_aligned = s.order == ScaleOrder::aligned_columns;
  if (!s.of_bytes) {
    const uint64_t index =
        s.order == ScaleOrder::rows
            ? uint64_t{p.row} * p.columns + p.column
            : protocol::column_major_at(is_aligned ? protocol::tma_stride(p.rows) : p.rows, p.row, p.column);
    store_word(at(s.data, index * 4), scale);
    if (is_aligned) pad_column(s.data, p, p.column, p.columns);
    return;
  }
  store_word(at(s.data, byte_offset(s.order, p, p.column)), static_cast<uint8_t>(scale));
  if (s.order == ScaleOrder::rows) return;
  const uint32_t end = static_cast<uint32_t>(protocol::align_up(p.columns, 4));
  if (p.column + 1 == p.columns) {
    for (uint32_t column = p.columns; column < end; ++column) {
      store_word(at(s.data, byte_offset(s.order, p, column)), uint8_t{0});
    }
  }
  if (is_aligned && p.column % 4 == 0) pad_column(s.data, p, p.column / 4, end / 4);
}

// By every vector, of which a block has 2 to the power of `shift`: its share of the rows that pad the last tiles. A tile is 32 units
// of 16 bytes, each of four rows; all vectors of the rows in a tile, in its four columns, take turns.
MNNVL_AR_HD void pad_tile(const BlockScales& s, const ScalePlace& p, uint32_t vector, uint32_t vectors,
                          uint32_t shift) {
  const uint32_t used = p.rows % 128;
  if (s.order != ScaleOrder::tiles || used == 0 || p.row / 128 != p.rows / 128) return;
  const uint32_t column_vectors = 4u << shift;  // of the tile's four columns
  const uint32_t first = vector & ~(column_vectors - 1);
  const uint32_t width = vectors - first < column_vectors ? vectors - first : column_vectors;
  uint8_t* const tile = at(s.data, protocol::byte_scale_at(protocol::ByteScales::swizzled_128x4, p.row / 128 * 128,
                                                           p.column / 4 * 4, p.columns));
  for (uint32_t unit = p.row % 128 + used * (vector - first); unit < 32; unit += used * width) {
    if (unit >= used) {
      store16(tile + unit * 16, Vector{});
      continue;
    }
    for (uint32_t quarter = 1; quarter < 4; ++quarter) {
      if (unit + quarter * 32 >= used) store_word(tile + unit * 16 + quarter * 4, 0u);
    }
  }
}

}  // namespace mnnvl_ar::epilogues
