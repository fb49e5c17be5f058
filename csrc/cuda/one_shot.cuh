// One-shot: every rank sends its rows to all others, each rank sums, and applies the epilogue. One hop.
//
// Launched with clusters that each hold a row (row.cuh); cluster c works on rows c, c + clusters, ... It sends all of them
// before it waits for the first (rule R5).
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/fanout.cuh"
#include "cuda/receive.cuh"

namespace mnnvl_ar::cuda {

// After the first send, in clocks of the SM: what peers send at that time is not there sooner (a hop takes some 1200), and looks
// for it would only be in its way.
inline constexpr uint32_t kHopClocks = 800;

template <class D, int kRanks, template <class, int> class Epilogue>
__global__ void __launch_bounds__(kMaxThreads, 1) one_shot(const __grid_constant__ Params p) {
  __shared__ Verdict verdict;
  __shared__ typename Epilogue<D, 1>::Shared shared;
  const Lane lane = this_lane();
  prepare_cta(lane, verdict, shared);
  const protocol::Shape shape{p.ranks, p.tokens, p.vectors, p.multicast != nullptr};
  if (!is_as_planned(p)) return refuse<D>(p);
  if (lane.role != Role::row) {
    return keep_books(p, lane, static_cast<uint32_t>(protocol::one_shot_vectors(shape)), verdict);
  }

  Epilogue<D, 1> epilogue(p, lane, verdict, shared);
  const bool active = epilogue.active();
  const uint32_t source_bytes = p.tokens * p.vectors * protocol::kVectorBytes;
  const uint32_t first = ptx::keep(vector_offset(p, lane.cluster, lane.vector));
  const auto load_x = [&](uint32_t offset) { return ptx::load(static_cast<const uint8_t*>(p.x) + offset); };
  const auto offset_of = [&](uint32_t row) { return vector_offset(p, row, lane.vector); };
  epilogue.prefetch_early(lane.cluster);
  Vector mine{};
  ptx::wait_for_predecessor();  // nothing but loads from here to the first store
  if (active) mine = load_x(first);
  stumble(p, 4);
  const Call call = enter(p, verdict);
  const bool sends = active && !call.broken;
  const auto send = [&](uint32_t offset, const Vector& x) {
    send_to_others<kRanks>(p, call.slot + uint64_t{p.rank} * source_bytes + offset, source_bytes, x);
  };
  stumble(p, 3);
  mine = for_the_wire(p, mine);
  if (sends) send(first, mine);
  const uint32_t sent = ptx::clock();
  entered(call, lane, verdict);
  for (uint32_t row = lane.cluster + lane.clusters; sends && row < p.tokens; row += lane.clusters) {
    send(offset_of(row), for_the_wire(p, load_x(offset_of(row))));
  }
  epilogue.prefetch({lane.cluster, 1});
  epilogue.prepare();
  RowCleaner(p, call).step(0, 1);

  while (ptx::clock() - sent < kHopClocks) {
  }
  const uint32_t own = shape.own_too ? kNone : p.rank;
  const uint8_t* const slot = p.block + call.slot;
  for (uint32_t row = lane.cluster, offset = first, round = 0; row < p.tokens; ++round) {
    Vector s[1] = {poison_vector<D>()};
    if (sends) s[0] = receive_sum<D, kRanks>(p, verdict, slot + offset, source_bytes, own, mine);
    const uint32_t next = row + lane.clusters;
    if (next >= p.tokens) ptx::barrier_arrive(kReceived, blockDim.x);
    epilogue.finish({row, 1}, round, s);
    row = next;
    if (row >= p.tokens) break;
    // Not at the head of the loop: a load that the first round skips would wait there for the one before it all the same.
    offset = offset_of(row);
    epilogue.prefetch({row, 1});
    if (active) mine = for_the_wire(p, load_x(offset));
  }
}

}  // namespace mnnvl_ar::cuda
