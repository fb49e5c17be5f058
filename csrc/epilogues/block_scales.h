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

// The last tiles of a call, of which `used` rows are there: 32 units of 16 bytes each, in which rows 32 apart stand side by side, so
// that padding is the end of a unit. Where workers are whole warps a thread has the same unit of each of its tiles, so
// that its loop needs no branch.
MNNVL_AR_HD void pad_tiles(uint8_t* first, uint32_t count, uint32_t used, uint32_t worker, uint32_t workers) {
  const uint32_t across = workers % 32 == 0 ? 32 : 1;
  MNNVL_AR_ROLLED
  for (uint32_t unit = worker % across; unit < 32; unit += across) {
    const uint32_t kept = unit < used ? (used - unit + 31) / 32 : 0;  // words of the unit that are there
    if (kept == 4) continue;
    uint8_t* place = first + worker / across * 512 + unit * 16;
    MNNVL_AR_ROLLED
    for (uint32_t tile = worker / across; tile < count; tile += workers / across) {
      if (kept == 0) store16(place, Vector{});
      if (kept == 1) store_word(place + 4, 0u);
      if (kept == 1 || kept == 2) store_word(place + 8, uint64_t{0});
      if (kept == 3) store_word(place + 12, 0u);
      place += workers / across * 512;
    }
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
  const uint32_t used = s.rows % 128;
  if (used == 0) return;
  pad_tiles(at(s.data, protocol::tiled_scale_at(s.rows - used, 0u, words)), words, used, worker, workers);
}

}  // namespace mnnvl_ar::epilogues
