// One-shot: every rank sends its rows to all, each rank sums, and applies the epilogue. One hop.
//
// Launched with clusters that each hold a row (row.cuh); cluster c works on rows c, c + clusters, ... It sends all of them
// before it waits for the first (rule R5).
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/fanout.cuh"
#include "cuda/receive.cuh"

namespace mnnvl_ar::cuda {

template <class D, int kRanks, template <class, int> class Epilogue>
__global__ void __launch_bounds__(kMaxThreads, 1) one_shot(const __grid_constant__ Params p) {
  __shared__ Verdict verdict;
  __shared__ typename Epilogue<D, 1>::Shared shared;
  const Lane lane = this_lane();
  prepare_cta(lane, verdict, shared);
  const protocol::Shape shape{p.ranks, p.tokens, p.vectors};
  if (!is_as_planned(p)) return refuse<D>(p);
  if (!lane.has_rows) {
    ptx::wait_for_predecessor();
    const Call call = enter(p, verdict);
    if (lane.is_steward) return steward_duty(p, call, lane, verdict);
    return usher_duty(p, call, static_cast<uint32_t>(protocol::one_shot_vectors(shape)), verdict);
  }

  Epilogue<D, 1> epilogue{p, lane, verdict, shared};
  const bool active = epilogue.active();
  const auto* input = static_cast<const uint8_t*>(p.x);
  const uint8_t* first = input + vector_offset(p, lane.cluster, lane.vector);
  epilogue.prefetch_early(lane.cluster);
  Vector x{};
  ptx::wait_for_predecessor();  // nothing but loads from here to the first store
  if (active) x = ptx::load(first);
  stumble(p, 4);
  const Call call = enter(p, verdict);
  const bool sends = active && !call.broken;
  const auto send = [&](uint32_t row) {
    const uint32_t position = static_cast<uint32_t>(protocol::one_shot_position(shape, p.rank, row, lane.vector));
    send_to_all<kRanks>(p, call.slot + position * protocol::kVectorBytes, for_the_wire(p, x));
  };
  stumble(p, 3);
  if (sends) send(lane.cluster);
  entered(call, lane, verdict);
  for (uint32_t row = lane.cluster + lane.clusters; sends && row < p.tokens; row += lane.clusters) {
    x = ptx::load(input + vector_offset(p, row, lane.vector));
    send(row);
  }
  epilogue.prefetch({lane.cluster, 1});
  epilogue.prepare();
  RowCleaner(p, call).step(0, 1);

  const uint32_t stride = p.tokens * p.vectors * protocol::kVectorBytes;
  uint32_t round = 0;
  for (uint32_t row = lane.cluster; row < p.tokens; row += lane.clusters, ++round) {
    if (round != 0) epilogue.prefetch({row, 1});
    Vector s[1] = {poison_vector<D>()};
    if (active && !call.broken) {
      s[0] = receive_sum<D, kRanks>(p, verdict, p.block + call.slot + vector_offset(p, row, lane.vector), stride);
    }
    if (row + lane.clusters >= p.tokens) ptx::barrier_arrive(kReceived, blockDim.x);
    epilogue.finish({row, 1}, round, s);
  }
}

}  // namespace mnnvl_ar::cuda
