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

Strategy strategy_of(int64_t asked, Shape call, const Table& table, const Choice* measured) {
  if (asked != kAuto) return static_cast<Strategy>(asked);
  if (measured != nullptr) return measured->strategy;
  return call.tokens * row_bytes(call) <= table.one_shot_bytes() ? Strategy::one_shot : Strategy::two_shot;
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
       {&c.row_bytes, &c.max_tokens, &c.strategies, &c.clusters, &c.max_ctas, &c.batches, &c.lags, &c.pdls}) {
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
    if (c.pdls[i] > 2) fail("strategy table: pdl ", c.pdls[i], ", wanted 0 (off), 1 (late) or 2 (early)");
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
                                      .lag = word(c.lags[i])},
                                     static_cast<protocol::Pdl>(c.pdls[i])}});
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

uint32_t Table::most_tokens(Strategy strategy, Shape largest) const {
  if (rows_.empty()) {
    const auto crossover =
        static_cast<uint32_t>(std::min<uint64_t>(largest.tokens, one_shot_bytes_ / row_bytes(largest)));
    if (strategy == Strategy::one_shot) return crossover;
    return crossover < largest.tokens ? largest.tokens : 0;
  }
  uint32_t most = 0, before = 0;
  const std::vector<Entry>& entries = nearest(largest).entries;
  for (const Entry& entry : entries) {
    if (before >= largest.tokens) break;
    const bool is_last = &entry == &entries.back();  // and stands for what is larger, too
    if (entry.choice.strategy == strategy) most = is_last ? largest.tokens : std::min(largest.tokens, entry.max_tokens);
    before = entry.max_tokens;
  }
  return most;
}

Cut cut(int64_t strategy, Shape call, const Table& table, uint64_t slot_vectors) {
  const Choice* measured = table.find(call);
  const Strategy taken = strategy_of(strategy, call, table, measured);
  const protocol::Pieces pieces = protocol::pieces_of(taken, call, slot_vectors);
  if (pieces.rows == 0 && call.tokens != 0) {
    const Shape row{call.ranks, 1, call.vectors, call.own_too};
    fail("x: a row of ", row_bytes(call), " bytes needs a slot of ",
         protocol::slot_vectors_of(taken, row) * protocol::kVectorBytes, " bytes, the workspace has ",
         slot_vectors * protocol::kVectorBytes, " (wanted Workspace.fits(tokens, hidden, dtype))");
  }
  if (pieces.count > 1) {
    const Choice* const of_piece = table.find({call.ranks, pieces.rows, call.vectors});
    if (of_piece != nullptr && of_piece->strategy == taken) measured = of_piece;
  }
  const bool is_known = measured != nullptr && measured->strategy == taken;
  return {is_known ? *measured : Choice{taken, {}}, pieces};
}

bool fits(int64_t strategy, Shape call, const Table& table, uint64_t slot_vectors) {
  if (call.tokens == 0) return true;
  const Strategy taken = strategy_of(strategy, call, table, table.find(call));
  return protocol::rows_that_fit(taken, call, slot_vectors) != 0;
}

uint64_t useful_vectors(int64_t strategy, Shape largest, const Table& table) {
  const auto vectors_for = [&](Strategy taken) {
    const uint32_t tokens = strategy == kAuto                         ? table.most_tokens(taken, largest)
                            : strategy == static_cast<int64_t>(taken) ? largest.tokens
                                                                      : 0;
    return protocol::slot_vectors_of(taken, {largest.ranks, tokens, largest.vectors, largest.own_too});
  };
  return std::max({vectors_for(Strategy::one_shot), vectors_for(Strategy::two_shot), least_vectors(largest)});
}

uint64_t least_vectors(Shape row) {
  row.tokens = 1;
  return std::max(protocol::one_shot_vectors(row), protocol::two_shot_vectors(row));
}

}  // namespace mnnvl_ar::launch
