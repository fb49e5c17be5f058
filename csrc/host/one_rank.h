// The host transport: the same calls over the same ring, by one thread a rank, in memory that processes share.
//
// Contract
//   * run() is the whole call of one rank. It returns when this rank's outputs are stored.
//   * Data moves as 64-bit atomics, released when stored and acquired when loaded; sentinel, layout, order and rounding are
//     those of csrc/protocol, so the bits are the device's.
//   * False: a fault. The record holds it, the block and every peer's are marked broken, outputs are NaN.
#pragma once

#include "protocol/call_params.h"

namespace mnnvl_ar::host {

bool run(const protocol::Params& p, protocol::Op op, protocol::Dtype dtype, protocol::Strategy strategy);

}  // namespace mnnvl_ar::host
