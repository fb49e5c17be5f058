// Which strategy a call takes, in how many pieces, in what launch shape, and the slot that it needs.
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
#include "protocol/pieces.h"
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
  protocol::Pdl pdl = protocol::Pdl::off;
};

// A call: how each of its pieces runs.
struct Cut {
  Choice choice;
  protocol::Pieces pieces;
};

// What was measured to be quickest, by bytes of a row and tokens; without measurements, a crossover by bytes of the message.
class Table {
 public:
  // Entries rise in row_bytes and, within these, in max_tokens. As mnnvl_ar/tuning/table.py has them, a column a field.
  struct Columns {
    int64_t one_shot_bytes;
    std::vector<int64_t> row_bytes, max_tokens, strategies, clusters, max_ctas, batches, lags, pdls;
  };

  Table() = default;
  explicit Table(const Columns& columns);

  // Of the nearest row size (of two as near, the smaller) the first entry with shape.tokens <= max_tokens, else the last. Null
  // without entries.
  const Choice* find(Shape shape) const;

  // The most tokens, up to largest.tokens, of a call that `auto` runs by this strategy; 0 for none.
  uint32_t most_tokens(Strategy strategy, Shape largest) const;

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

// A strategy that is forced is taken, or else the table's, for the whole call. The launch shape and the PDL mode are the table's for a
// call of a piece's size, or else of the call's, if it was measured for this strategy. Throws if not even one row fits
// `slot_vectors`.
Cut cut(int64_t strategy, Shape call, const Table& table, uint64_t slot_vectors);

// Whether cut() does not throw.
bool fits(int64_t strategy, Shape call, const Table& table, uint64_t slot_vectors);

// Vectors of a slot in which every call of up to largest.tokens rows is one launch, by the strategy that it takes. More would be of
// no use: fewer than this are enough for any call.
uint64_t useful_vectors(int64_t strategy, Shape largest, const Table& table);

// Vectors of a slot in which a row of that size goes by either strategy.
uint64_t least_vectors(Shape row);

}  // namespace mnnvl_ar::launch
