#include "diagnosis/evidence.h"

#include <algorithm>
#include <cstddef>
#include <set>

#include "protocol/pieces.h"
#include "protocol/signature.h"

namespace mnnvl_ar::diagnosis {

using namespace protocol;

namespace {

using Board = std::vector<Vector>;

const Vector& row_of(const Board& board, uint32_t slot, uint32_t source) { return board[slot * kMaxRanks + source]; }

// Of the second board: the numbers of a norm.
const Vector& numbers_of(const Board& board, uint32_t slot, uint32_t source) {
  return row_of(board, kSlots + slot, source);
}

bool is_signature(const Vector& v) { return v.word[0] != kNoEpoch && v.word[0] == v.word[2]; }

Sent sent_of(const Vector& v, const Vector& numbers) {
  const bool are_there = is_signature_of(numbers, v.word[0]);
  return {v.word[0], v.word[1], v.word[3], are_there ? Numbers{numbers.word[1], numbers.word[3]} : Numbers{}};
}

// What each rank's call lays out in a slot: nothing if that cannot be told from its signature.
Shape shape_of(const Blocks& blocks, const Sent& call) {
  const Group& group = blocks.params.group;
  Shape shape{group.ranks, call.tokens, vectors_of(call.description), group.multicast != nullptr};
  const Pieces pieces = pieces_of(strategy_of(call.description), shape, blocks.slot_vectors);
  const uint32_t piece = piece_of(call.description);
  const bool is_known = piece < pieces.count && pieces.count <= kSignedPieces;
  shape.tokens = is_known ? pieces.rows_of(piece, call.tokens) : 0;
  return shape;
}

void note_newest(Sent& newest, const Sent& call) {
  if (newest.epoch == kNoEpoch || epoch_distance(newest.epoch, call.epoch) > 0) newest = call;
}

// Whose part of `rank`'s newest call, or piece of a call, is still the sentinel in its slot.
void look_for_data(const Blocks& blocks, const Board& board, uint32_t rank, RankView& view) {
  const Sent& call = view.newest;
  const Group& group = blocks.params.group;
  const Shape shape = shape_of(blocks, call);
  if (shape.tokens == 0) return;
  const bool one_shot = strategy_of(call.description) == Strategy::one_shot;
  const uint64_t count = slot_vectors_of(strategy_of(call.description), shape);
  if (count > blocks.slot_vectors) return;
  std::vector<Vector> slot(count);
  const uint64_t offset = slot_offset(slot_of(call.epoch), group.slot_bytes);
  if (!BlockReader(blocks).read(rank, offset, slot.data(), count * kVectorBytes)) return;
  const auto lacks = [&](uint64_t position) { return !has_arrived(slot[position]); };
  const uint32_t width = one_shot ? shape.vectors : columns_of(shape, rank);
  for (uint32_t source = 0; source < shape.ranks; ++source) {
    if (source == rank && one_shot) continue;
    if (!agrees(row_of(board, slot_of(call.epoch), source), call.tokens, call.description))
      continue;  // lays out otherwise
    for (uint32_t i = 0; i < shape.tokens * width && !view.lacks[source]; ++i) {
      const uint32_t token = i / width, v = i % width;
      const bool gone = lacks(one_shot ? one_shot_position(shape, source_of(shape, source, rank), token, v)
                                       : scatter_position(shape, source, token, v));
      view.lacks[source] = view.lacks[source] || gone;
    }
  }
  if (one_shot) return;
  for (uint32_t token = 0; token < shape.tokens; ++token) {
    for (uint32_t v = 0; v < shape.vectors; ++v) {
      if (lacks(gather_position(shape, token, v))) view.lacks_sums[v / owned_columns(shape)] = true;
    }
  }
}

}  // namespace

Evidence gather(const Blocks& blocks) {
  const BlockReader reader(blocks);
  const uint32_t ranks = blocks.params.group.ranks;
  Evidence found;
  found.ranks.resize(ranks);
  std::vector<Board> boards(ranks);
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    boards[rank].resize(kBoardBytes / kVectorBytes);
    if (!reader.read(rank, kBoardOffset, boards[rank].data(), kBoardBytes)) {
      boards[rank].assign(kBoardBytes / kVectorBytes, signature(kNoEpoch, 0, 0));
    }
    reader.read(rank, kProgressOffset + offsetof(Progress, later), &found.ranks[rank].later, sizeof(uint32_t));
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      for (uint32_t source = 0; source < ranks; ++source) {
        const Vector& v = row_of(boards[rank], slot, source);
        if (!is_signature(v)) continue;
        const Sent call = sent_of(v, numbers_of(boards[rank], slot, source));
        note_newest(found.ranks[source].newest, call);
        found.calls.push_back({source, call});
      }
    }
  }
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    RankView& view = found.ranks[rank];
    if (view.newest.epoch == kNoEpoch) continue;
    for (uint32_t source = 0; source < ranks; ++source) {
      if (!is_signature_of(row_of(boards[rank], slot_of(view.newest.epoch), source), view.newest.epoch))
        view.lacks[source] = true;
    }
    view.lacks[rank] = false;  // killed before it had signed its own board
    look_for_data(blocks, boards[rank], rank, view);
    view.lacks[rank] = view.lacks_sums[rank] = false;
  }
  return found;
}

uint32_t number_of(const Evidence& evidence, uint32_t rank, const Sent& call) {
  // Of the later pieces that the rank has counted, those that are not behind the call.
  std::set<uint32_t> behind;
  for (const Announced& a : evidence.calls) {
    if (a.rank == rank && piece_of(a.call.description) != 0 && epoch_distance(call.epoch, a.call.epoch) > 0) {
      behind.insert(a.call.epoch);
    }
  }
  const uint64_t later = uint64_t{evidence.ranks[rank].later} + kEpochs - behind.size();
  return static_cast<uint32_t>((call.epoch + 2 * uint64_t{kEpochs} - later % kEpochs) % kEpochs);
}

RankSet roots(const Evidence& evidence) {
  RankSet wanted, waiting, wanted_sums, waiting_sums;
  for (uint32_t rank = 0; rank < evidence.ranks.size(); ++rank) {
    const RankView& view = evidence.ranks[rank];
    wanted |= view.lacks;
    wanted_sums |= view.lacks_sums;
    waiting[rank] = view.lacks.any();
    waiting_sums[rank] = view.lacks.any() || view.lacks_sums.any();
  }
  const RankSet found = wanted & ~waiting;
  return found.any() ? found : wanted_sums & ~waiting_sums;
}

}  // namespace mnnvl_ar::diagnosis
