// Which strategy a call takes, in what launch shape, and the slot that it needs.
//
// Contract
//   * The same functions size a workspace and judge every call.
//   * The answer is a function of the table, the slot, the shape and the strategy asked for, never of a rank or a device: what all
//     ranks have alike, since bring-up compares it.
//   * A look-up is on the path of every call: it allocates nothing and takes no lock.
//   * What makes no sense throws std::runtime_error naming argument, got and wanted.
#pragma once

#include <cstdint>
#include <vector>

#include "protocol/layout.h"
#include "protocol/params.h"
#include "protocol/signature.h"

namespace mnnvl_ar::launch {

using protocol::LaunchShape;
using protocol::Shape;
using protocol::Strategy;

// A Strategy, or kAuto where an op or a workspace leaves it open.
inline constexpr int64_t kAuto = -1;

struct Choice {
  Strategy strategy;
  LaunchShape shape;
};

// What was measured to be quickest, by bytes of a row and tokens; without measurements, a crossover by bytes of the message.
class Table {
 public:
  // Entries rise in row_bytes and, within these, in max_tokens. As mnnvl_ar/tuning/table.py has them, a column a field.
  struct Columns {
    int64_t one_shot_bytes;
    std::vector<int64_t> row_bytes, max_tokens, strategies, clusters, max_ctas, batches, lags;
  };

  Table() = default;
  explicit Table(const Columns& columns);

  // Of the nearest row size (of two as near, the smaller) the first entry with shape.tokens <= max_tokens, else the last. Null
  // without entries.
  const Choice* find(Shape shape) const;

  // The most tokens, up to largest.tokens, for which one-shot is known to be the quicker one. Beyond a row's last entry nothing is
  // known, so a slot need not have room for one-shot there.
  uint32_t one_shot_tokens(Shape largest) const;

  uint64_t one_shot_bytes() const { return one_shot_bytes_; }

 private:
  struct Entry {
    uint32_t max_tokens;
    Choice choice;
  };
  struct Row {
    uint64_t bytes;
    std::vector<Entry> entries;
  };
  const Row& nearest(Shape shape) const;

  uint64_t one_shot_bytes_ = 0;
  std::vector<Row> rows_;
};

// A strategy that is forced is taken. `auto` takes the table's, or the other one where only that fits. The launch shape is the
// table's if it was measured for this strategy. Throws if what is left does not fit `slot_vectors`.
Choice choose(int64_t strategy, Shape shape, const Table& table, uint64_t slot_vectors);

// Whether choose() does not throw.
bool fits(int64_t strategy, Shape shape, const Table& table, uint64_t slot_vectors);

// Vectors a slot needs for every call of up to largest.tokens rows. `auto` includes two-shot of any size, so that calls may also
// force it, and whatever the table prefers up to its last entry.
uint64_t needed_vectors(int64_t strategy, Shape largest, const Table& table);

}  // namespace mnnvl_ar::launch
