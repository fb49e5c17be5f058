// Blocks of host ranks that are threads of one process, for the native programs.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "protocol/layout.h"
#include "protocol/params.h"

namespace mnnvl_ar {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Block = std::unique_ptr<uint8_t, Free>;

// One rank's, aligned as 16-byte vectors need it and not a byte longer, but `missing` bytes shorter.
inline Block make_block(uint64_t slot_bytes, uint64_t missing = 0) {
  const uint64_t size = protocol::block_bytes(slot_bytes) - missing;
  Block block(static_cast<uint8_t*>(std::aligned_alloc(16, size)));
  std::memset(block.get(), 0, protocol::kControlBytes);
  std::memset(block.get() + protocol::kBoardOffset, 0xff, protocol::kBoardBytes);  // kNoEpoch
  auto* words = reinterpret_cast<uint32_t*>(block.get() + protocol::kControlBytes);
  for (uint64_t i = 0; i < (size - protocol::kControlBytes) / 4; ++i) words[i] = protocol::kSentinel;
  return block;
}

// What rank `rank` is given of its group; the record is still to be set.
inline protocol::Params params_of(uint32_t rank, const std::vector<Block>& blocks, uint64_t slot_bytes,
                                  const protocol::Orders& orders) {
  protocol::Params p{};
  protocol::Group& g = p.group;
  const auto ranks = static_cast<uint32_t>(blocks.size());
  g.rank = rank, g.ranks = ranks, g.slot_bytes = slot_bytes;
  g.orders = &orders;
  g.block = blocks[rank].get();
  for (uint32_t i = 0; i < ranks; ++i) g.peers[i] = blocks[(rank + 1 + i) % ranks].get();
  return p;
}

}  // namespace mnnvl_ar
