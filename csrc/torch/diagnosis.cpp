#include "torch/diagnosis.h"

#include <algorithm>
#include <atomic>

#include "torch/block_reader.h"
#include "torch/evidence.h"
#include "torch/notes.h"

namespace mnnvl_ar {

using namespace protocol;

namespace {

constexpr uint64_t kBrokenOffset = kProgressOffset + offsetof(Progress, broken);
constexpr int64_t kSecond = 1000000000;
constexpr int64_t kPatienceNs = 2 * kSecond;  // for notes, before what is known is all there will be

int64_t clock_ns(clockid_t clock) {
  timespec t{};
  clock_gettime(clock, &t);
  return t.tv_sec * kSecond + t.tv_nsec;
}

// Unix time of the record's end, or now if its clock tells nothing.
int64_t when_of(const FaultRecord& record, bool is_host) {
  const int64_t now = clock_ns(CLOCK_REALTIME), ended = static_cast<int64_t>(record.ended_ns);
  if (record.code == 0) return now;
  const int64_t then = is_host ? now - (clock_ns(CLOCK_MONOTONIC) - ended) : ended;  // %globaltimer counts Unix time
  return then > now || now - then > 86400 * kSecond ? now : then;
}

std::vector<Note> read_notes(const std::vector<uint8_t>& control, uint32_t ranks) {
  std::vector<Note> notes(ranks);
  std::memcpy(notes.data(), control.data() + kNotesOffset, ranks * sizeof(Note));
  return notes;
}

// What a call left behind; all zero while its code is not written.
FaultRecord read_record(const FaultRecord& record) {
  if (static_cast<const volatile FaultRecord&>(record).code == 0) return {};
  std::atomic_thread_fence(std::memory_order_acquire);
  return record;
}

// Offset of the first word that is not the canary, or 0.
uint64_t damaged(const Workspace& w, const std::vector<uint8_t>& control) {
  if (is_off(w.params, Rule::canary)) return 0;
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

bool same(const Sent& a, const Sent& b) { return a.tokens == b.tokens && a.description == b.description; }

// Ranks whose calls of one number differ: fills in peer, the odd one out as far as that can be told, and waiter, one of the others.
bool find_difference(const Evidence& evidence, const std::vector<Note>& notes, const Sent& mine, Finding& f) {
  const auto ranks = static_cast<uint32_t>(evidence.ranks.size());
  int best = -1;
  for (const Announced& odd : evidence.calls) {
    uint32_t alike = 0, others = 0, other = ranks;
    const Sent* ours = nullptr;
    for (uint32_t r = 0; r < ranks; ++r) {
      const Sent* call = call_of(evidence, r, odd.call.epoch);
      if (call == nullptr && r == f.rank && mine.epoch == odd.call.epoch) call = &mine;
      if (r == f.rank) ours = call;
      if (call == nullptr) continue;
      same(*call, odd.call) ? ++alike : ++others;
      if (!same(*call, odd.call) && other == ranks) other = r;
    }
    if (others == 0 || alike > others) continue;
    const bool differs_from_ours = ours != nullptr && !same(*ours, odd.call);
    const bool is_noted = std::any_of(notes.begin(), notes.end(), [&](const Note& note) {
      return note.code == static_cast<uint32_t>(FaultCode::call_mismatch) && note.peer == odd.rank;
    });
    const int score = alike < others ? 3 : differs_from_ours ? 2 : ours == nullptr && is_noted ? 1 : 0;
    if (score <= best) continue;
    best = score;
    f.peer = odd.rank;
    f.peer_call = odd.call;
    f.waiter = differs_from_ours ? f.rank : other;
    const Sent* call = call_of(evidence, f.waiter, odd.call.epoch);
    f.call = call != nullptr ? *call : mine;
  }
  f.conclusive = best > 0;
  return best >= 0;
}

void find_culprit(const Evidence& evidence, const FaultRecord& record, const std::vector<Note>& notes, Finding& f) {
  const bool found_here = record.code == static_cast<uint32_t>(FaultCode::peer_timeout);
  const auto ranks = static_cast<uint32_t>(evidence.ranks.size());
  for (uint32_t author = 0; author < ranks && !found_here; ++author) {
    const Note& note = notes[author];
    if (note.code != static_cast<uint32_t>(FaultCode::peer_timeout) || note.peer >= ranks) continue;
    f.peer = note.peer;
    f.waiter = author;
    f.waited_ns = uint64_t{note.waited_ms} * 1000000;
    if (const Sent* call = call_of(evidence, author, note.epoch)) f.call = *call;
    f.conclusive = true;
    return;
  }
  RankSet suspects = roots(evidence);
  if (record.code != 0 && suspects.count() > 1) suspects[f.rank] = false;  // it calls
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

// What only the rank at fault can know: it has told us who it is and what is wrong, in a note or as it marked us.
bool take_word_for_it(const Evidence& evidence, const std::vector<uint8_t>& control, const std::vector<Note>& notes,
                      Finding& f) {
  uint32_t broken;
  std::memcpy(&broken, control.data() + kBrokenOffset, sizeof(broken));
  const auto ranks = static_cast<uint32_t>(notes.size());
  for (uint32_t author = 0; author < ranks; ++author) {
    if (notes[author].code != kDamaged) continue;
    f.code = kDamaged;
    f.peer = author;
    f.offset = notes[author].epoch;
    return true;
  }
  const auto code = static_cast<FaultCode>(told_code(broken));
  if (told_by(broken) >= ranks || (code != FaultCode::launch_shape && code != FaultCode::two_at_once)) return false;
  f.code = told_code(broken);
  f.peer = told_by(broken);
  f.call = evidence.ranks[f.peer].newest;
  return true;
}

Finding conclude(const Workspace& w, const FaultRecord& record, const std::vector<uint8_t>& control) {
  Finding f;
  f.rank = w.params.rank;
  f.waiter = f.rank;
  f.when_ns = when_of(record, w.settings.device < 0);
  const Evidence evidence = gather(w);
  for (const RankView& view : evidence.ranks) f.newest.push_back(view.newest);
  f.call = record.code != 0 ? Sent{record.epoch, record.tokens, record.description} : f.newest[f.rank];
  if (record.code != 0) f.waited_ns = record.ended_ns - record.began_ns;
  const Sent mine = f.call;
  const std::vector<Note> notes = read_notes(control, w.params.ranks);
  const auto code = static_cast<FaultCode>(record.code);
  f.told = code == FaultCode::peer_fault || code == FaultCode::none;
  f.code = record.code != 0 ? record.code : static_cast<uint32_t>(FaultCode::peer_fault);
  if ((f.offset = damaged(w, control)) != 0) {
    f.code = kDamaged;
    f.peer = f.rank;
    f.told = false;
    f.conclusive = true;
  } else if (code == FaultCode::call_mismatch) {
    f.peer = record.peer;
    f.peer_call = {record.epoch, record.peer_tokens, record.peer_description};
    f.conclusive = true;
  } else if (code == FaultCode::overlap || code == FaultCode::launch_shape || code == FaultCode::two_at_once) {
    f.peer = f.rank;
    f.conclusive = true;
  } else if (f.told && take_word_for_it(evidence, control, notes, f)) {
    f.conclusive = true;
  } else if (code != FaultCode::peer_timeout && find_difference(evidence, notes, mine, f)) {
    f.code = static_cast<uint32_t>(FaultCode::call_mismatch);
  } else {
    find_culprit(evidence, record, notes, f);
    if (f.peer < w.params.ranks) f.code = static_cast<uint32_t>(FaultCode::peer_timeout);
  }
  if (f.peer < f.newest.size() && f.peer_call.epoch == kNoEpoch) f.peer_call = f.newest[f.peer];
  return f;
}

// Leaves a note with the peers, and sees to it that nobody goes on.
void tell(const Workspace& w, const Finding& f) {
  const BlockReader blocks(w);
  const Note note{f.code, f.peer, f.code == kDamaged ? static_cast<uint32_t>(f.offset) : f.call.epoch,
                  static_cast<uint32_t>(f.waited_ns / 1000000)};
  for (uint32_t rank = 0; rank < w.params.ranks; ++rank) {
    uint32_t broken = 0;
    if (!f.told) blocks.write(rank, note_offset(w.params.rank), &note, sizeof(note));
    if (!blocks.read(rank, kBrokenOffset, &broken, sizeof(broken)) || broken != 0) continue;
    broken = told(f.rank, f.code);
    blocks.write(rank, kBrokenOffset, &broken, sizeof(broken));
  }
}

}  // namespace

Finding poll(Workspace& w) {
  if (is_of_another_process(w)) return {};
  const std::lock_guard<std::mutex> lock(w.reading);
  if (w.finding.conclusive || w.closed || w.asleep) return w.finding;
  std::vector<uint8_t> control(kControlBytes);
  uint32_t broken = 0;
  const bool is_readable = BlockReader(w).read(w.params.rank, 0, control.data(), kControlBytes);
  if (is_readable) std::memcpy(&broken, control.data() + kBrokenOffset, sizeof(broken));
  // After the mark: if this rank has set it, the record is there.
  const FaultRecord record = read_record(*w.params.record);
  if (record.code == 0 && (!is_readable || (broken == 0 && damaged(w, control) == 0))) return w.finding;
  const int64_t first = w.finding.when_ns;
  w.finding = conclude(w, record, control);
  if (first != 0) w.finding.when_ns = first;
  w.finding.conclusive |= clock_ns(CLOCK_REALTIME) - w.finding.when_ns > kPatienceNs;
  w.found = true;
  if (w.finding.conclusive) tell(w, w.finding);
  return w.finding;
}

Finding explain(Workspace& w) {
  Finding finding = poll(w);
  for (int tries = 0; tries < 20 && finding.code != 0 && !finding.conclusive; ++tries) {
    usleep(5000);
    finding = poll(w);
  }
  return finding;
}

void end_calls(Workspace& w) {
  const uint32_t broken = static_cast<uint32_t>(FaultCode::peer_fault);
  BlockReader(w).write(w.params.rank, kBrokenOffset, &broken, sizeof(broken));
}

bool quiesce([[maybe_unused]] const Workspace& w) {
#if MNNVL_AR_CUDA
  if (w.settings.device >= 0) {
    const BesideCaptures guard(w.settings.device);
    return guard.stream() != nullptr && cudaDeviceSynchronize() == cudaSuccess;
  }
#endif
  return true;
}

}  // namespace mnnvl_ar
