// What the control words hold besides the ring's: what each rank found, as notes to its peers, and canaries in between.
#pragma once

#include <cstddef>

#include "protocol/fault.h"
#include "protocol/layout.h"

namespace mnnvl_ar::diagnosis {

using protocol::FaultCode;

// How a peer went. The numbers of mnnvl_ar/memory/lifeline.py, too.
enum class Departure : uint32_t { died = 0, closed = 1, asleep = 2, checkpoint = 3, recovers = 4, exited = 5 };

// In every block, one from each rank: what it found.
struct alignas(16) Note {
  FaultCode code;  // none: no note
  uint32_t peer;
  uint32_t epoch;
  uint32_t detail;  // milliseconds waited, or of a peer that is gone a Departure
};

inline constexpr uint64_t kNotesOffset = 8192;
inline constexpr uint64_t kNotesBytes = protocol::kMaxRanks * sizeof(Note);

inline constexpr uint64_t note_offset(uint32_t from) { return kNotesOffset + from * sizeof(Note); }

struct Area {
  uint64_t offset;
  uint64_t bytes;
};

inline constexpr uint64_t kFirstCanary = protocol::kProgressOffset + sizeof(protocol::Progress);
inline constexpr uint64_t kBoardEnd = protocol::kBoardOffset + protocol::kBoardBytes;
inline constexpr uint64_t kNotesEnd = kNotesOffset + kNotesBytes;
inline constexpr uint64_t kProbeEnd = protocol::kProbeOffset + protocol::kMaxRanks * protocol::kVectorBytes;
static_assert(kBoardEnd <= kNotesOffset && kNotesEnd <= protocol::kProbeOffset);

inline constexpr Area kCanaries[] = {
    {kFirstCanary, protocol::kBoardOffset - kFirstCanary},
    {kBoardEnd, kNotesOffset - kBoardEnd},
    {kNotesEnd, protocol::kProbeOffset - kNotesEnd},
    {kProbeEnd, protocol::kControlBytes - kProbeEnd},
};

}  // namespace mnnvl_ar::diagnosis
