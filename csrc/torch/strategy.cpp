#include "torch/strategy.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

namespace mnnvl_ar {

using protocol::Shape;
using protocol::Strategy;

namespace {

constexpr size_t kFields = 7;  // of an entry

uint64_t row_bytes(Shape shape) { return uint64_t{shape.vectors} * protocol::kVectorBytes; }

uint64_t vectors_of(Strategy strategy, Shape shape) {
  return strategy == Strategy::one_shot ? protocol::one_shot_vectors(shape) : protocol::two_shot_vectors(shape);
}

bool select(int64_t strategy, Shape shape, const Table& table, uint64_t slot_vectors, Pick* pick) {
  const Pick* const measured = table.find(shape);
  Strategy taken = shape.tokens * row_bytes(shape) <= table.one_shot_bytes() ? Strategy::one_shot : Strategy::two_shot;
  if (measured != nullptr) taken = measured->strategy;
  if (strategy != kAuto) taken = static_cast<Strategy>(strategy);
  bool fit = vectors_of(taken, shape) <= slot_vectors;
  if (!fit && strategy == kAuto) {
    taken = taken == Strategy::one_shot ? Strategy::two_shot : Strategy::one_shot;
    fit = vectors_of(taken, shape) <= slot_vectors;
  }
  *pick = measured != nullptr && measured->strategy == taken ? *measured : Pick{taken, {}};
  return fit;
}

}  // namespace

Table::Table(const std::vector<int64_t>& flat) {
  STD_TORCH_CHECK(flat.size() % kFields == 1, "strategy table: ", flat.size(), " numbers, wanted 1 and ", kFields,
                  " an entry");
  for (int64_t number : flat) STD_TORCH_CHECK(number >= 0, "strategy table: holds ", number, ", wanted 0 or more");
  one_shot_bytes_ = static_cast<uint64_t>(flat[0]);
  for (size_t i = 1; i < flat.size(); i += kFields) {
    const auto bytes = static_cast<uint64_t>(flat[i]);
    const auto number = [&](size_t field) {
      STD_TORCH_CHECK(flat[i + field] <= INT32_MAX, "strategy table: holds ", flat[i + field], ", wanted 32 bits");
      return static_cast<uint32_t>(flat[i + field]);
    };
    STD_TORCH_CHECK(number(2) <= 1, "strategy table: strategy ", number(2), ", wanted 0 (one-shot) or 1 (two-shot)");
    const bool is_new = rows_.empty() || rows_.back().bytes != bytes;
    const bool rises =
        is_new ? rows_.empty() || rows_.back().bytes < bytes : rows_.back().entries.back().max_tokens < number(1);
    STD_TORCH_CHECK(rises, "strategy table: rows of ", bytes, " bytes, ", number(1),
                    " tokens: wanted entries in rising order");
    if (is_new) rows_.push_back({bytes, {}});
    rows_.back().entries.push_back(
        {number(1), {static_cast<Strategy>(number(2)), {number(3), number(4), number(5), number(6)}}});
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

const Pick* Table::find(Shape shape) const {
  if (rows_.empty()) return nullptr;
  const std::vector<Entry>& entries = nearest(shape).entries;
  const auto found = std::lower_bound(entries.begin(), entries.end(), shape.tokens,
                                      [](const Entry& entry, uint32_t tokens) { return entry.max_tokens < tokens; });
  return found == entries.end() ? &entries.back().pick : &found->pick;
}

uint32_t Table::one_shot_tokens(Shape largest) const {
  if (rows_.empty())
    return static_cast<uint32_t>(std::min<uint64_t>(largest.tokens, one_shot_bytes_ / row_bytes(largest)));
  uint32_t most = 0, before = 0;
  for (const Entry& entry : nearest(largest).entries) {
    if (before >= largest.tokens) break;
    if (entry.pick.strategy == Strategy::one_shot) most = std::min(largest.tokens, entry.max_tokens);
    before = entry.max_tokens;
  }
  return most;
}

Pick choose(int64_t strategy, Shape shape, const Table& table, uint64_t slot_vectors) {
  Pick pick;
  STD_TORCH_CHECK(select(strategy, shape, table, slot_vectors, &pick), "x: ", shape.tokens, " tokens of ",
                  row_bytes(shape), " bytes need a slot of ", vectors_of(pick.strategy, shape) * protocol::kVectorBytes,
                  " bytes, the workspace has ", slot_vectors * protocol::kVectorBytes,
                  " (wanted Workspace.fits(tokens, hidden, dtype))");
  return pick;
}

bool fits(int64_t strategy, Shape shape, const Table& table, uint64_t slot_vectors) {
  Pick ignored;
  return select(strategy, shape, table, slot_vectors, &ignored);
}

uint64_t needed_vectors(int64_t strategy, Shape largest, const Table& table) {
  if (strategy != kAuto) return vectors_of(static_cast<Strategy>(strategy), largest);
  const Shape last_one_shot{largest.ranks, table.one_shot_tokens(largest), largest.vectors};
  return std::max(protocol::one_shot_vectors(last_one_shot), protocol::two_shot_vectors(largest));
}

}  // namespace mnnvl_ar
