// What every rank's block tells about its newest call, and about what that call still lacks.
#pragma once

#include <bitset>
#include <vector>

#include "diagnosis/diagnosis.h"

namespace mnnvl_ar::diagnosis {

using RankSet = std::bitset<protocol::kMaxRanks>;

struct RankView {
  Sent newest;         // the call that it began last, as anybody saw it
  uint32_t later = 0;  // protocol::Progress::later
  RankSet lacks;       // ranks whose signature or share for it has not come; sending those waits for nobody
  RankSet lacks_sums;  // two-shot: owners whose sums have not come; sending those waits for all shares
};

struct Announced {
  uint32_t rank;
  Sent call;
};

struct Evidence {
  std::vector<RankView> ranks;
  std::vector<Announced> calls;  // of the last three or so of each rank
};

Evidence gather(const Blocks& blocks);

// The number of a rank's call, one of those that it made last.
uint32_t number_of(const Evidence& evidence, uint32_t rank, const Sent& call);

// Those for whom others wait and who wait for nobody.
RankSet roots(const Evidence& evidence);

}  // namespace mnnvl_ar::diagnosis
