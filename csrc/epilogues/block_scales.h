// Scales of blocks, each stored where its layout has it (protocol/scale_layout.h), and the padding beside it, which is 0.
//
// Contract
//   * A scale is stored by the first vector of its block, padding by pad_scales(): every byte of the tensor by one of them, once,
//     however the call was cut or spread.
//   * `row` is of the call; `column` is the block's place in the row.
//   * A tensor of scales is smaller than 4 GiB, so that a kernel finds its places by 32 bits.
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

// Of a whole call.
struct BlockScales {
  void* data;
  ScaleOrder order;
  bool of_bytes;  // or of fp32
  uint32_t rows, columns;
  // Where a scale stands, but in tiles: row * row_bytes + (column >> packing) * column_bytes + column % (1 << packing).
  uint32_t row_bytes, column_bytes, packing;

  BlockScales() = default;
  BlockScales(void* data, ScaleOrder order, bool of_bytes, uint32_t rows, uint32_t columns)
      : data(data), order(order), of_bytes(of_bytes), rows(rows), columns(columns), packing(0) {
    const uint32_t size = of_bytes ? 1 : 4;
    if (order == ScaleOrder::rows || order == ScaleOrder::tiles) {
      row_bytes = columns * size;
      column_bytes = size;
      return;
    }
    const bool is_aligned = order == ScaleOrder::aligned_columns;
    packing = of_bytes ? 2 : 0;
    row_bytes = 4;
    column_bytes = static_cast<uint32_t>(is_aligned ? protocol::tma_stride(rows) : rows) * 4;
  }
};

MNNVL_AR_HD uint32_t scale_offset(const BlockScales& s, uint32_t row, uint32_t column) {
  if (s.order == ScaleOrder::tiles) return protocol::tiled_scale_at(row, column, (s.columns + 3) / 4);
  return row * s.row_bytes + (column >> s.packing) * s.column_bytes + (column & ((1u << s.packing) - 1));
}

// `scale`: a byte, or the bits of an fp32.
MNNVL_AR_HD void store_scale(const BlockScales& s, uint32_t offset, uint32_t scale) {
  if (s.of_bytes) {
    store_word(at(s.data, offset), static_cast<uint8_t>(scale));
  } else {
    store_word(at(s.data, offset), scale);
  }
}

// By `workers` threads, of which this is number `worker`: what pads the rows of this launch, and, if the call's last row is among
// them, what stands behind that.
MNNVL_AR_HD void pad_scales(const BlockScales& s, const Tensors& t, uint32_t worker, uint32_t workers) {
  if (s.order == ScaleOrder::columns || s.order == ScaleOrder::rows) return;
  const uint32_t words = (s.columns + 3) / 4;  // of a row of bytes
  const uint32_t beside = s.of_bytes ? words * 4 - s.columns : 0;
  MNNVL_AR_ROLLED
  for (uint32_t i = worker; i < t.tokens * beside; i += workers) {
    store_scale(s, scale_offset(s, t.first_token + i / beside, s.columns + i % beside), 0);
  }
  if (t.first_token + t.tokens != t.call_tokens) return;
  if (s.order == ScaleOrder::aligned_columns) {
    const uint32_t behind = static_cast<uint32_t>(protocol::tma_stride(s.rows)) - s.rows;
    const uint32_t columns = (s.of_bytes ? words : s.columns) - 1;  // the last one ends with the last row
    MNNVL_AR_ROLLED
    for (uint32_t i = worker; i < behind * columns; i += workers) {
      store_word(at(s.data, i / behind * s.column_bytes + (s.rows + i % behind) * 4), 0u);
    }
    return;
  }
  const uint32_t used = s.rows % 128;  // rows of the last tiles, which are 32 units of 16 bytes, each of four rows
  if (used == 0) return;
  uint8_t* const tiles = at(s.data, protocol::tiled_scale_at(s.rows - used, 0u, words));
  MNNVL_AR_ROLLED
  for (uint32_t i = worker; i < 32 * words; i += workers) {
    const uint32_t unit = i % 32;
    if (unit >= used) {
      store16(tiles + i * 16, Vector{});
      continue;
    }
    MNNVL_AR_ROLLED
    for (uint32_t quarter = 1; quarter < 4; ++quarter) {
      if (unit + quarter * 32 >= used) store_word(tiles + i * 16 + quarter * 4, 0u);
    }
  }
}

}  // namespace mnnvl_ar::epilogues
