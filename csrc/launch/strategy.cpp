#include "launch/strategy.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace mnnvl_ar::launch {

namespace {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

uint64_t row_bytes(Shape shape) { return uint64_t{shape.vectors} * protocol::kVectorBytes; }

uint64_t vectors_of(Strategy strategy, Shape shape) {
  return strategy == Strategy::one_shot ? protocol::one_shot_vectors(shape) : protocol::two_shot_vectors(shape);
}

bool select(int64_t strategy, Shape shape, const Table& table, uint64_t slot_vectors, Choice* choice) {
  const Choice* const measured = table.find(shape);
  Strategy taken = shape.tokens * row_bytes(shape) <= table.one_shot_bytes() ? Strategy::one_shot : Strategy::two_shot;
  if (measured != nullptr) taken = measured->strategy;
  if (strategy != kAuto) taken = static_cast<Strategy>(strategy);
  bool fit = vectors_of(taken, shape) <= slot_vectors;
  if (!fit && strategy == kAuto) {
    taken = taken == Strategy::one_shot ? Strategy::two_shot : Strategy::one_shot;
    fit = vectors_of(taken, shape) <= slot_vectors;
  }
  *choice = measured != nullptr && measured->strategy == taken ? *measured : Choice{taken, {}};
  return fit;
}

}  // namespace

Table::Table(const Columns& c) : one_shot_bytes_(static_cast<uint64_t>(c.one_shot_bytes)) {
  const auto check_number = [](int64_t number) {
    if (number < 0) fail("strategy table: holds ", number, ", wanted 0 or more");
    if (number > INT32_MAX) fail("strategy table: holds ", number, ", wanted 32 bits");
  };
  if (c.one_shot_bytes < 0) fail("strategy table: holds ", c.one_shot_bytes, ", wanted 0 or more");
  const size_t count = c.row_bytes.size();
  for (const auto* column :
       {&c.row_bytes, &c.max_tokens, &c.strategies, &c.clusters, &c.max_ctas, &c.batches, &c.lags}) {
    if (column->size() != count) fail("strategy table: columns of ", count, " and of ", column->size(), " entries");
    std::for_each(column->begin(), column->end(), check_number);
  }
  const auto word = [](int64_t number) { return static_cast<uint32_t>(number); };
  for (size_t i = 0; i < count; ++i) {
    const auto bytes = static_cast<uint64_t>(c.row_bytes[i]);
    const uint32_t tokens = word(c.max_tokens[i]);
    if (c.strategies[i] > 1) {
      fail("strategy table: strategy ", c.strategies[i], ", wanted 0 (one-shot) or 1 (two-shot)");
    }
    const bool is_new = rows_.empty() || rows_.back().bytes != bytes;
    const bool rises =
        is_new ? rows_.empty() || rows_.back().bytes < bytes : rows_.back().entries.back().max_tokens < tokens;
    if (!rises) {
      fail("strategy table: rows of ", bytes, " bytes, ", tokens, " tokens: wanted entries in rising order");
    }
    if (is_new) rows_.push_back({bytes, {}});
    rows_.back().entries.push_back({tokens,
                                    {static_cast<Strategy>(c.strategies[i]),
                                     {.cluster = word(c.clusters[i]),
                                      .max_ctas = word(c.max_ctas[i]),
                                      .batch = word(c.batches[i]),
                                      .lag = word(c.lags[i])}}});
  }
}

const Table::Row& Table::nearest(Shape shape) const {
  const uint64_t bytes = row_bytes(shape);
  const auto above =
      std::lower_bound(rows_.begin(), rows_.end(), bytes, [](const Row& row, uint64_t b) { return row.bytes < b; });
  if (above == rows_.begin()) return *above;
  const auto below = above - 1;
  return above == rows_.end() || bytes - below->bytes <= above->bytes - bytes ? *below : *above;
}

const Choice* Table::find(Shape shape) const {
  if (rows_.empty()) return nullptr;
  const std::vector<Entry>& entries = nearest(shape).entries;
  const auto found = std::lower_bound(entries.begin(), entries.end(), shape.tokens,
                                      [](const Entry& entry, uint32_t tokens) { return entry.max_tokens < tokens; });
  return found == entries.end() ? &entries.back().choice : &found->choice;
}

uint32_t Table::one_shot_tokens(Shape largest) const {
  if (rows_.empty())
    return static_cast<uint32_t>(std::min<uint64_t>(largest.tokens, one_shot_bytes_ / row_bytes(largest)));
  uint32_t most = 0, before = 0;
  for (const Entry& entry : nearest(largest).entries) {
    if (before >= largest.tokens) break;
    if (entry.choice.strategy == Strategy::one_shot) most = std::min(largest.tokens, entry.max_tokens);
    before = entry.max_tokens;
  }
  return most;
}

Choice choose(int64_t strategy, Shape shape, const Table& table, uint64_t slot_vectors) {
  Choice choice;
  if (!select(strategy, shape, table, slot_vectors, &choice)) {
    fail("x: ", shape.tokens, " tokens of ", row_bytes(shape), " bytes need a slot of ",
         vectors_of(choice.strategy, shape) * protocol::kVectorBytes, " bytes, the workspace has ",
         slot_vectors * protocol::kVectorBytes, " (wanted Workspace.fits(tokens, hidden, dtype))");
  }
  return choice;
}

bool fits(int64_t strategy, Shape shape, const Table& table, uint64_t slot_vectors) {
  Choice ignored;
  return select(strategy, shape, table, slot_vectors, &ignored);
}

uint64_t needed_vectors(int64_t strategy, Shape largest, const Table& table) {
  if (strategy != kAuto) return vectors_of(static_cast<Strategy>(strategy), largest);
  const Shape last_one_shot{largest.ranks, table.one_shot_tokens(largest), largest.vectors};
  return std::max(protocol::one_shot_vectors(last_one_shot), protocol::two_shot_vectors(largest));
}

}  // namespace mnnvl_ar::launch
