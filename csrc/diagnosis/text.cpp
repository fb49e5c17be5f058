// A finding in words: one paragraph that names ranks and calls.
#include <algorithm>
#include <cstdio>

#include "diagnosis/diagnosis.h"
#include "epilogues/list.h"
#include "protocol/numerics_base.h"

namespace mnnvl_ar::diagnosis {

using namespace protocol;

namespace {

std::string rank_text(const Finding& f, uint32_t rank) {
  if (rank >= kMaxRanks) return "a rank that could not be made out";
  return "rank " + std::to_string(rank) + (rank == f.rank && f.relayed ? " (this one)" : "");
}

std::string call_text(const Sent& call) {
  return name_of_call(call) + (call.epoch == kNoEpoch ? "" : ", call number " + std::to_string(call.number));
}

std::string seconds_text(uint64_t ns) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.2f s", static_cast<double>(ns) / 1e9);
  return text;
}

std::string number_text(uint32_t bits) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", static_cast<double>(as_float(bits)));
  return text;
}

// Where `theirs` differs from `ours` in what their names do not say.
std::string difference_text(const Sent& theirs, const Sent& ours) {
  std::string text;
  const auto differ = [&text](const char* what, const std::string& a, const std::string& b) {
    if (a != b) text += std::string(text.empty() ? ", with " : ", ") + what + " " + a + " instead of " + b;
  };
  const uint32_t a = theirs.description, b = ours.description;
  if (op_of(a) != op_of(b)) return text;
  const auto yes_or_no = [](uint32_t variant, uint32_t bit) { return variant & bit ? "yes" : "no"; };
  differ("tag", std::to_string(tag_of(a)), std::to_string(tag_of(b)));
  differ("eps", number_text(theirs.numbers.eps), number_text(ours.numbers.eps));
  differ("weight_bias", number_text(theirs.numbers.weight_bias), number_text(ours.numbers.weight_bias));
  const uint32_t v = variant_of(a), w = variant_of(b);
  differ("weight in fp32:", yes_or_no(v, kWeightIsFp32), yes_or_no(w, kWeightIsFp32));
  differ("norm stored too:", yes_or_no(v, kNormToo), yes_or_no(w, kNormToo));
  static const char* const kinds[] = {"fp32", "powers of two", "ue8m0", "unknown"};
  static const char* const orders[] = {"row-major", "column-major", "TMA-aligned", "tiles of 128x4"};
  const auto kind = [](uint32_t variant) { return kinds[bits_of(variant, kScaleKindAt, kScaleKindBits)]; };
  const auto order = [](uint32_t variant) { return orders[bits_of(variant, kScaleOrderAt, kScaleOrderBits)]; };
  differ("scales as", kind(v), kind(w));
  differ("layout of scales", order(v), order(w));
  return text;
}

std::string departure_text(Departure how) {
  switch (how) {
    case Departure::asleep: return "has put its workspace to sleep";
    case Departure::checkpoint: return "has given its workspace up for a checkpoint";
    case Departure::recovers: return "recovers its workspace, or wakes it";
    case Departure::exited: return "has ended its process";
    default: return "has closed its workspace";
  }
}

std::string headline(const Finding& f) {
  switch (f.code) {
    case FaultCode::peer_timeout: {
      const std::string waited =
          f.waited_ns != 0 ? " waited " + seconds_text(f.waited_ns) : std::string(" waited too long");
      return rank_text(f, f.waiter) + waited + " for " + rank_text(f, f.peer) + " in " + call_text(f.call);
    }
    case FaultCode::call_mismatch: {
      const uint32_t other = std::min(f.peer, f.other);  // one of them at most is known
      if (other >= kMaxRanks) {
        return "a peer called something else where " + rank_text(f, f.waiter) + " called " + call_text(f.call);
      }
      const std::string difference = difference_text(f.peer_call, f.call);
      const bool alike = difference.empty() && name_of_call(f.peer_call) == name_of_call(f.call) &&
                         f.peer_call.epoch == f.call.epoch && f.call.epoch != kNoEpoch;
      return rank_text(f, other) + " called " + name_of_call(f.peer_call) + " where " + rank_text(f, f.waiter) +
             " called " + call_text(f.call) + difference +
             (alike ? "; both sign the same by now, so one of them has signed that call twice" : "") +
             (f.peer < kMaxRanks
                  ? ""
                  : "; which of the two is wrong cannot be told, as no third rank has come to that call");
    }
    case FaultCode::overlap:
      return rank_text(f, f.rank) + ": the previous call did not end within " + seconds_text(f.waited_ns) + " of " +
             call_text(f.call);
    case FaultCode::launch_shape:
      return rank_text(f, f.peer) + ": " + call_text(f.call) +
             " was launched in another shape than it was planned in, as happens when cudaGraphExecUpdate gives a graph "
             "the call of another size; instantiate the graph anew instead";
    case FaultCode::two_at_once:
      return rank_text(f, f.peer) + ": two calls of that rank on this workspace ran at once, " + call_text(f.call) +
             " one of them; calls on one workspace must follow each other, on one stream or ordered by events";
    case FaultCode::ended:
      return rank_text(f, f.peer) + " ended its call itself, " + call_text(f.call) +
             ": a signal's handler raised there, or close(force=True), wake() or recover() was called";
    case FaultCode::asleep:
      return rank_text(f, f.peer) + ": " + name_of_call(f.call) +
             " ran, as part of a CUDA graph, while its workspace was asleep or after close(force=True); it computed "
             "nothing, and its outputs are NaN";
    case FaultCode::peer_died: return "the process of " + rank_text(f, f.peer) + " has died";
    case FaultCode::peer_left:
      return rank_text(f, f.peer) + " " + departure_text(f.how) + ", and " + rank_text(f, f.waiter) +
             " waited for it in a later call, " + call_text(f.call);
    case FaultCode::damaged: {
      char offset[32];
      std::snprintf(offset, sizeof(offset), "0x%llx", static_cast<unsigned long long>(f.offset));
      return rank_text(f, f.peer) + ": control words overwritten at offset " + offset +
             " of its block, by something outside of this library";
    }
    default:
      return "rank " + std::to_string(f.rank) + " was told of a fault by a peer in " + call_text(f.call) +
             "; the peer's own error names the cause";
  }
}

}  // namespace

std::string name_of_call(const Sent& call) {
  if (call.epoch == kNoEpoch) return "no call";
  static const char* const dtypes[] = {"bfloat16", "float16", "float32"};
  static const char* const strategies[] = {"one_shot", "two_shot"};
  const epilogues::Listed* const epilogue = epilogues::find(op_of(call.description));
  const auto dtype = static_cast<uint32_t>(dtype_of(call.description));
  const auto strategy = static_cast<uint32_t>(strategy_of(call.description));
  const uint32_t element_bytes = dtype_of(call.description) == Dtype::float32 ? 4 : 2;
  return std::string(epilogue != nullptr ? epilogue->name : "unknown op") + "([" + std::to_string(call.tokens) + ", " +
         std::to_string(vectors_of(call.description) * kVectorBytes / element_bytes) + "], " +
         (dtype < 3 ? dtypes[dtype] : "unknown dtype") + ", " +
         (strategy < 2 ? strategies[strategy] : "unknown strategy") + ")" +
         (piece_of(call.description) == 0 ? "" : " (piece " + std::to_string(piece_of(call.description) + 1) + ")");
}

std::string text_of(const Finding& f) {
  if (f.code == FaultCode::none) return "";
  std::string text = headline(f) + ".";
  if (f.relayed) text += " A peer found this and told rank " + std::to_string(f.rank) + ".";
  if (f.code == FaultCode::asleep) return text;
  text += " Newest call of each rank:";
  for (size_t rank = 0; rank < f.newest.size(); ++rank) {
    text += (rank ? "; rank " : " rank ") + std::to_string(rank) + ": " + call_text(f.newest[rank]);
  }
  return text + ".";
}

}  // namespace mnnvl_ar::diagnosis
