#include "diagnosis/diagnosis.h"

#include <algorithm>
#include <atomic>

#include "diagnosis/evidence.h"
#include "epilogues/list.h"
#include "protocol/signature.h"

namespace mnnvl_ar::diagnosis {

using namespace protocol;

namespace {

constexpr int64_t kSecond = 1000000000;
constexpr int64_t kPatienceNs = 2 * kSecond;  // for notes, before what is known is all there will be
constexpr int64_t kShortNs = kSecond / 20;    // of a fault that is older than that, unless the GPU's clock is wrong

int64_t clock_ns(clockid_t clock) {
  timespec t{};
  clock_gettime(clock, &t);
  return t.tv_sec * kSecond + t.tv_nsec;
}

// Unix time of the record's end, or now if its clock tells nothing.
int64_t when_of(const FaultRecord& record, bool is_host) {
  const int64_t now = clock_ns(CLOCK_REALTIME), ended = static_cast<int64_t>(record.ended_ns);
  if (record.code == FaultCode::none) return now;
  const int64_t then = is_host ? now - (clock_ns(CLOCK_MONOTONIC) - ended) : ended;  // %globaltimer counts Unix time
  return then > now || now - then > 86400 * kSecond ? now : then;
}

// Of this rank's block: what has broken it, or 0.
uint32_t mark_of(const std::vector<uint8_t>& control) {
  uint32_t broken;
  std::memcpy(&broken, control.data() + kBrokenOffset, sizeof(broken));
  return broken;
}

std::vector<Note> read_notes(const std::vector<uint8_t>& control, uint32_t ranks) {
  std::vector<Note> notes(ranks);
  std::memcpy(notes.data(), control.data() + kNotesOffset, ranks * sizeof(Note));
  return notes;
}

// What a call left behind; all zero while its code is not written.
FaultRecord read_record(const FaultRecord& record) {
  if (static_cast<const volatile FaultRecord&>(record).code == FaultCode::none) return {};
  std::atomic_thread_fence(std::memory_order_acquire);
  return record;
}

// Offset of the first word that is not the canary, or 0.
uint64_t damaged(const Blocks& blocks, const std::vector<uint8_t>& control) {
  if (is_off(blocks.params, Rule::canary)) return 0;
  for (const Area& area : kCanaries) {
    for (uint64_t offset = area.offset; offset < area.offset + area.bytes; offset += 4) {
      uint32_t word;
      std::memcpy(&word, control.data() + offset, 4);
      if (word != kCanary) return offset;
    }
  }
  return 0;
}

const Sent* call_of(const Evidence& evidence, uint32_t rank, uint32_t epoch) {
  for (const Announced& a : evidence.calls) {
    if (a.rank == rank && a.call.epoch == epoch) return &a.call;
  }
  return nullptr;
}

bool same(const Sent& a, const Sent& b) {
  return a.tokens == b.tokens && a.description == b.description && a.numbers == b.numbers;
}

// Whether that may be a signature, and not some word that was written over a board.
bool is_plausible(const Sent& call) {
  return call.tokens != 0 && dtype_of(call.description) <= Dtype::float32 &&
         epilogues::find(op_of(call.description)) != nullptr;
}

// A rank that has signed two calls as one, each for other peers to see: they ran at once, whatever was noticed of it first. Numbers
// of a norm are signed apart, and may be on their way.
bool find_two_at_once(const Evidence& evidence, Finding& f) {
  for (const Announced& a : evidence.calls) {
    const Sent* const first = call_of(evidence, a.rank, a.call.epoch);
    if (first->tokens == a.call.tokens && first->description == a.call.description) continue;
    if (!is_plausible(*first) || !is_plausible(a.call)) continue;
    f.code = FaultCode::two_at_once;
    f.peer = f.waiter = a.rank;
    f.call = a.call;
    return true;
  }
  return false;
}

// Ranks that say of themselves that they were to make another call of this number than `odd`, and had not signed one before the
// workspace was broken.
uint32_t witnesses_against(const Evidence& evidence, const std::vector<Note>& notes, const Announced& odd,
                           uint32_t self) {
  uint32_t found = 0;
  for (uint32_t author = 0; author < notes.size(); ++author) {
    const Note& note = notes[author];
    const bool is_against =
        note.code == FaultCode::call_mismatch && note.peer == odd.rank && note.epoch == odd.call.epoch;
    found += is_against && author != self && call_of(evidence, author, note.epoch) == nullptr;
  }
  return found;
}

// Ranks whose calls of one number differ: fills in peer, the odd one out as far as that can be told, and waiter, one of the others.
// Of two, each is right for itself. A rank that had not come to that call, where two others differ, cannot tell which is odd unless
// a third one says so: what the two say of each other is the same.
bool find_difference(const Evidence& evidence, const std::vector<Note>& notes, const Sent& mine, Finding& f) {
  const auto ranks = static_cast<uint32_t>(evidence.ranks.size());
  const auto call_at = [&](uint32_t rank, uint32_t epoch) {
    const Sent* const call = call_of(evidence, rank, epoch);
    return call == nullptr && rank == f.rank && mine.epoch == epoch ? &mine : call;
  };
  int best = -1;
  for (const Announced& odd : evidence.calls) {
    uint32_t alike = 0, others = 0, other = ranks;
    for (uint32_t r = 0; r < ranks; ++r) {
      const Sent* const call = call_at(r, odd.call.epoch);
      if (call == nullptr) continue;
      same(*call, odd.call) ? ++alike : ++others;
      if (!same(*call, odd.call) && other == ranks) other = r;
    }
    if (others == 0) continue;
    others += witnesses_against(evidence, notes, odd, f.rank);
    if (alike > others) continue;
    const Sent* const ours = call_at(f.rank, odd.call.epoch);
    const bool differs_from_ours = ours != nullptr && !same(*ours, odd.call);
    const int score = alike < others ? 2 : differs_from_ours ? 1 : 0;
    if (score <= best) continue;
    best = score;
    f.waiter = differs_from_ours ? f.rank : other;
    f.call = *call_at(f.waiter, odd.call.epoch);
    f.peer = score > 0 ? odd.rank : kMaxRanks;
    f.other = score > 0 ? kMaxRanks : odd.rank;
    f.peer_call = odd.call;
  }
  f.conclusive = best > 0;
  return best >= 0;
}

// A difference that a peer has found, and that is not to be seen any more. Its note says with whom.
bool take_difference(const Evidence& evidence, const std::vector<uint8_t>& control, const std::vector<Note>& notes,
                     Finding& f) {
  const uint32_t broken = mark_of(control);
  const auto ranks = static_cast<uint32_t>(notes.size());
  const uint32_t author = author_of_mark(broken);
  if (code_of_mark(broken) != FaultCode::call_mismatch || author >= ranks) return false;
  const Note& note = notes[author];
  f.waiter = author;
  f.call = evidence.ranks[author].newest;
  f.peer = kMaxRanks;
  if (note.code != FaultCode::call_mismatch || note.peer >= ranks) return true;
  const Sent* const its = call_of(evidence, author, note.epoch);
  const Sent* const peers = call_of(evidence, note.peer, note.epoch);
  f.peer = note.peer;
  if (its != nullptr) f.call = *its;
  if (peers != nullptr) f.peer_call = *peers;
  f.conclusive = its != nullptr && peers != nullptr;
  return true;
}

void find_culprit(const Evidence& evidence, const FaultRecord& record, const std::vector<Note>& notes, Finding& f) {
  const bool found_here = record.code == FaultCode::peer_timeout;
  const auto ranks = static_cast<uint32_t>(evidence.ranks.size());
  for (uint32_t author = 0; author < ranks && !found_here; ++author) {
    const Note& note = notes[author];
    if (note.code != FaultCode::peer_timeout || note.peer >= ranks) continue;
    f.peer = note.peer;
    f.waiter = author;
    f.waited_ns = uint64_t{note.detail} * 1000000;
    if (const Sent* call = call_of(evidence, author, note.epoch)) f.call = *call;
    f.conclusive = true;
    return;
  }
  RankSet suspects = roots(evidence);
  if (record.code != FaultCode::none && suspects.count() > 1) suspects[f.rank] = false;  // it calls
  if (found_here) suspects[f.rank] = false;
  f.conclusive = suspects.any();
  f.peer = found_here ? record.peer : kMaxRanks;
  if (!suspects.any() || (f.peer < ranks && suspects[f.peer])) return;
  for (f.peer = 0; !suspects[f.peer];) ++f.peer;
  for (uint32_t r = 0; r < ranks && !found_here; ++r) {
    const RankView& view = evidence.ranks[r];
    if (!view.lacks[f.peer] && !view.lacks_sums[f.peer]) continue;
    f.waiter = r;
    f.call = view.newest;
  }
}

// Of a mark: whether its author is taken for the rank at fault, who mostly is the only one to know this.
bool is_of_author(FaultCode code) {
  return code == FaultCode::launch_shape || code == FaultCode::two_at_once || code == FaultCode::ended;
}

// What the rank at fault has said: who it is and what is wrong, in a note or in the mark on our block.
bool take_from_peer(const Evidence& evidence, const std::vector<uint8_t>& control, const std::vector<Note>& notes,
                    Finding& f) {
  const uint32_t broken = mark_of(control);
  const auto ranks = static_cast<uint32_t>(notes.size());
  for (uint32_t author = 0; author < ranks; ++author) {
    if (notes[author].code != FaultCode::damaged) continue;
    f.code = FaultCode::damaged;
    f.peer = author;
    f.offset = notes[author].epoch;
    return true;
  }
  const FaultCode code = code_of_mark(broken);
  if (author_of_mark(broken) >= ranks || !is_of_author(code)) return false;
  f.code = code;
  f.peer = author_of_mark(broken);
  f.call = evidence.ranks[f.peer].newest;
  return true;
}

// Whom a mark of ours names: this rank, or who is at fault where that is taken for the author.
uint32_t author_of(const Finding& f) { return is_of_author(f.code) ? f.peer : f.rank; }

bool is_departure(const Note& note) { return is_heard_by_all(note.code); }

// That a peer is gone, as this rank has heard, or another one. Who is gone may have gone because of somebody else, of which it has
// left a note then: that one was first.
bool find_departure(const Evidence& evidence, const std::vector<Note>& notes, Finding& f) {
  const auto ranks = static_cast<uint32_t>(notes.size());
  const auto first = static_cast<uint32_t>(std::find_if(notes.begin(), notes.end(), is_departure) - notes.begin());
  uint32_t author = is_departure(notes[f.rank]) ? f.rank : first;
  if (author == ranks || notes[author].peer >= ranks) return false;
  for (uint32_t followed = 1; followed < ranks; ++followed) {
    const uint32_t gone = notes[author].peer;
    const bool is_because = is_departure(notes[gone]) && notes[gone].peer < ranks;
    if (!is_because || notes[gone].peer == f.rank || notes[gone].peer == author) break;
    author = gone;
  }
  f.code = notes[author].code;
  f.peer = notes[author].peer;
  f.how = static_cast<Departure>(notes[author].detail);
  f.relayed = author != f.rank;
  if (f.relayed) f.waiter = author, f.call = evidence.ranks[author].newest;
  f.waited_ns = 0;
  return true;
}

Finding conclude(const Blocks& blocks, const FaultRecord& record, const std::vector<uint8_t>& control) {
  Finding f;
  f.rank = blocks.params.group.rank;
  f.waiter = f.rank;
  f.when_ns = when_of(record, blocks.device < 0);
  const Evidence evidence = gather(blocks);
  for (const RankView& view : evidence.ranks) f.newest.push_back(view.newest);
  f.call = record.code != FaultCode::none ? Sent{record.epoch, record.tokens, record.description, record.numbers}
                                          : f.newest[f.rank];
  if (record.code != FaultCode::none) f.waited_ns = record.ended_ns - record.began_ns;
  const Sent mine = f.call;
  const std::vector<Note> notes = read_notes(control, blocks.params.group.ranks);
  const FaultCode code = record.code;
  f.relayed = code == FaultCode::peer_fault || code == FaultCode::none;
  f.code = code != FaultCode::none ? code : FaultCode::peer_fault;
  const uint32_t broken = mark_of(control);
  const auto own = static_cast<FaultCode>(broken);
  // What stands in for a block; and end_calls(), unless something was found before.
  if (own == FaultCode::asleep || (own == FaultCode::ended && f.relayed)) {
    f.code = own;
    f.peer = f.rank;
    f.relayed = false;
    f.conclusive = true;
  } else if ((f.offset = damaged(blocks, control)) != 0) {
    f.code = FaultCode::damaged;
    f.peer = f.rank;
    f.relayed = false;
    f.conclusive = true;
  } else if (code == FaultCode::overlap || code == FaultCode::launch_shape || code == FaultCode::two_at_once ||
             code == FaultCode::ended) {
    f.peer = f.rank;
    f.conclusive = true;
  } else if (code == FaultCode::call_mismatch) {
    if (!find_two_at_once(evidence, f)) {
      f.peer = record.peer;
      f.peer_call = {record.epoch, record.peer_tokens, record.peer_description, record.peer_numbers};
    }
    f.conclusive = true;
  } else if (find_departure(evidence, notes, f) || (f.relayed && take_from_peer(evidence, control, notes, f)) ||
             find_two_at_once(evidence, f)) {
    f.conclusive = true;
  } else if (code != FaultCode::peer_timeout && find_difference(evidence, notes, mine, f)) {
    f.code = FaultCode::call_mismatch;
  } else if (f.relayed && take_difference(evidence, control, notes, f)) {
    f.code = FaultCode::call_mismatch;
  } else {
    find_culprit(evidence, record, notes, f);
    if (f.peer < blocks.params.group.ranks) f.code = FaultCode::peer_timeout;
  }
  if (f.peer < f.newest.size() && f.peer_call.epoch == kNoEpoch) f.peer_call = f.newest[f.peer];
  const auto number = [&](uint32_t rank, Sent& call) {
    if (rank < f.newest.size() && call.epoch != kNoEpoch) call.number = number_of(evidence, rank, call);
  };
  for (uint32_t rank = 0; rank < f.newest.size(); ++rank) number(rank, f.newest[rank]);
  number(f.waiter, f.call);
  number(std::min(f.peer, f.other), f.peer_call);
  return f;
}

// Leaves a note with the peers, and marks every block that is not marked, so that nobody goes on. What a peer has told is no news,
// but for a call of our own that its signature does not show: that is said for those who had not come to it.
void tell_peers(const Blocks& blocks, const Finding& f) {
  const BlockReader memory(blocks);
  const bool is_news = !f.relayed || (f.code == FaultCode::call_mismatch && f.waiter == f.rank);
  const Group& group = blocks.params.group;
  const Note note{
      f.code, f.peer, f.code == FaultCode::damaged ? static_cast<uint32_t>(f.offset) : f.call.epoch,
      is_heard_by_all(f.code) ? static_cast<uint32_t>(f.how) : static_cast<uint32_t>(f.waited_ns / 1000000)};
  for (uint32_t rank = 0; rank < group.ranks; ++rank) {
    uint32_t broken = 0;
    if (f.code == FaultCode::peer_died && rank == f.peer) continue;
    if (is_news) memory.write(rank, note_offset(group.rank), &note, sizeof(note));
    if (f.code == FaultCode::peer_left) continue;  // to others it may owe nothing yet
    if (!memory.read(rank, kBrokenOffset, &broken, sizeof(broken)) || broken != 0) continue;
    broken = peer_mark(author_of(f), f.code);
    memory.write(rank, kBrokenOffset, &broken, sizeof(broken));
  }
}

}  // namespace

bool look(const Blocks& blocks, Finding& finding) {
  std::vector<uint8_t> control(kControlBytes);
  uint32_t broken = 0;
  const bool is_readable = BlockReader(blocks).read(blocks.params.group.rank, 0, control.data(), kControlBytes);
  if (is_readable) broken = mark_of(control);
  // After the mark: if this rank has set it, the record is there.
  const FaultRecord record = read_record(*blocks.params.group.record);
  if (record.code == FaultCode::none && (!is_readable || (broken == 0 && damaged(blocks, control) == 0))) {
    return finding.code != FaultCode::none;
  }
  const int64_t first = finding.when_ns, now = clock_ns(CLOCK_MONOTONIC);
  const int64_t looked = finding.looked_ns != 0 ? finding.looked_ns : now;
  finding = conclude(blocks, record, control);
  if (first != 0) finding.when_ns = first;
  finding.looked_ns = looked;
  const bool is_old = clock_ns(CLOCK_REALTIME) - finding.when_ns > kPatienceNs;
  finding.conclusive |= now - looked > (is_old ? kShortNs : kPatienceNs);
  if (finding.conclusive) tell_peers(blocks, finding);
  return true;
}

bool look_at_record(const Blocks& blocks, Finding& finding) {
  const FaultRecord record = read_record(*blocks.params.group.record);
  if (record.code == FaultCode::none) return finding.code != FaultCode::none;
  finding = Finding{};
  finding.code = FaultCode::asleep;
  finding.conclusive = true;
  finding.rank = finding.waiter = finding.peer = blocks.params.group.rank;
  finding.call = {record.epoch, record.tokens, record.description, record.numbers};
  finding.when_ns = when_of(record, blocks.device < 0);
  return true;
}

void end_calls(const Blocks& blocks) {
  const auto broken = static_cast<uint32_t>(FaultCode::ended);
  BlockReader(blocks).write(blocks.params.group.rank, kBrokenOffset, &broken, sizeof(broken));
}

uint32_t next_epoch_of(const Blocks& blocks) {
  uint32_t epoch = kNoEpoch;
  const bool is_read =
      BlockReader(blocks).read(blocks.params.group.rank, kStateOffset + offsetof(State, epoch), &epoch, sizeof(epoch));
  return is_read ? epoch : kNoEpoch;
}

Loss lose(const Blocks& blocks, uint32_t peer, Departure how, uint32_t next, uint32_t& waiting) {
  const BlockReader memory(blocks);
  const Group& group = blocks.params.group;
  struct {
    State state;
    Progress progress;
  } ring;
  static_assert(kStateOffset == 0 && kProgressOffset == sizeof(State) && sizeof(ring) == 32);
  if (!memory.read(group.rank, kStateOffset, &ring, sizeof(ring))) return Loss::done;
  if (ring.progress.broken != 0) return Loss::done;  // something else was first, or this
  const auto code = how == Departure::died ? FaultCode::peer_died : FaultCode::peer_left;
  const uint32_t current = ring.state.epoch == 0 ? kEpochs - 1 : ring.state.epoch - 1;
  if (code == FaultCode::peer_left) {
    const uint32_t before = waiting;
    waiting = kNoEpoch;
    if (ring.state.launched == ring.progress.finished) return Loss::idle;
    // What it had queued when it said so may have run since; whatever has run here has been signed here.
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      Vector row;
      if (!memory.read(group.rank, board_offset(slot, peer), &row, sizeof(row))) return Loss::done;
      if (row.word[0] == kNoEpoch || !is_signature_of(row, row.word[0])) continue;
      if (next == kNoEpoch || epoch_distance(next, next_epoch(row.word[0])) > 0) next = next_epoch(row.word[0]);
    }
    const bool is_owed = next == kNoEpoch || epoch_distance(next, current) >= 0;
    if (!is_owed) return Loss::idle;
    waiting = current;
    if (before != current) return Loss::waits;
  }
  const Note note{code, peer, next, static_cast<uint32_t>(how)};
  for (uint32_t ahead = 0; ahead < group.ranks; ++ahead) {  // notes before any mark: who sees a mark knows why
    const uint32_t rank = (group.rank + ahead) % group.ranks;
    if (rank != peer) memory.write(rank, note_offset(group.rank), &note, sizeof(note));
  }
  const auto broken = static_cast<uint32_t>(code);
  memory.write(group.rank, kBrokenOffset, &broken, sizeof(broken));
  return Loss::done;
}

Quiet quiesce([[maybe_unused]] const Blocks& blocks) {
#if MNNVL_AR_CUDA
  if (blocks.device >= 0) {
    const BesideCaptures guard(blocks.device);
    if (guard.stream() == nullptr) return Quiet::failed;
    const cudaError_t error = cudaDeviceSynchronize();
    const bool capturing = error == cudaErrorStreamCaptureUnsupported || error == cudaErrorStreamCaptureInvalidated;
    return error == cudaSuccess ? Quiet::yes : capturing ? Quiet::capturing : Quiet::failed;
  }
#endif
  return Quiet::yes;
}

}  // namespace mnnvl_ar::diagnosis
