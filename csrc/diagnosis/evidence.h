// What every rank's block tells about its newest call, and about what that call still lacks.
#pragma once

#include <bitset>
#include <vector>

#include "diagnosis/diagnosis.h"

namespace mnnvl_ar::diagnosis {

using RankSet = std::bitset<protocol::kMaxRanks>;

struct RankView {
  Sent newest;         // the call that it began last, as anybody saw it
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

// Those for whom others wait and who wait for nobody.
RankSet roots(const Evidence& evidence);

}  // namespace mnnvl_ar::diagnosis
