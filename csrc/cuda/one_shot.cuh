// One-shot: every rank sends its rows to all others, each rank sums, and applies the epilogue. One hop.
//
// Launched with clusters that each hold a row (row.cuh); cluster c works on rows c, c + clusters, ... Where all rows have a
// cluster (Tile::kOnce) that is all. Where they queue up, a cluster sends the row behind the one that it waits for, so that the
// link is busy while rows are summed. All ranks take rows in rising order: no cluster waits for a row before it has sent
// all lower ones of its own, so whatever the grids, the lowest row that anybody waits for has been sent (rule R5).
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/fanout.cuh"
#include "cuda/receive.cuh"

namespace mnnvl_ar::cuda {

// After the first send, in clocks of the SM: what peers send at that time is not there sooner (a hop takes some 1200), and looks
// for it would only be in its way.
inline constexpr uint32_t kHopClocks = 1000;

// CTAs of full size that an SM is to hold at once: where rows queue up for two ranks, the link is busy with as many as fit.
template <int kRanks, class Tile>
inline constexpr int kCtas = kRanks == 2 && !Tile::kOnce ? 2 : 1;

template <class D, int kRanks, class Tile, template <class, class> class Epilogue>
__global__ void __launch_bounds__(kMaxThreads, kCtas<kRanks, Tile>) one_shot(const __grid_constant__ Params p) {
  constexpr int kColumns = Tile::kColumns;
  __shared__ Verdict verdict;
  __shared__ typename Epilogue<D, Tile>::Shared shared;
  const Lane lane = this_lane<kColumns>();
  prepare_cta(lane, verdict, shared);
  const protocol::Shape shape{p.ranks, p.tokens, p.vectors, p.multicast != nullptr};
  if (!is_as_planned<Tile::kOnce>(p)) return refuse<D>(p);
  if (lane.role != Role::row) {
    return keep_books(p, lane, static_cast<uint32_t>(protocol::one_shot_vectors(shape)), verdict);
  }

  Epilogue<D, Tile> epilogue(p, lane, verdict, shared);
  const uint32_t source_bytes = p.tokens * p.vectors * protocol::kVectorBytes;
  const uint32_t first = ptx::keep(vector_offset(p, lane.cluster, lane.vector));
  const Sender<kRanks> to_others(p, source_bytes);
  const auto offset_of = [&](uint32_t row) { return vector_offset(p, row, lane.vector); };
  uint32_t columns = 0;
#pragma unroll
  for (int column = 0; column < kColumns; ++column) columns += epilogue.holds(column);
  const auto load_x = [&](uint32_t offset, Vector(&x)[kColumns]) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (column < columns) x[column] = ptx::load(static_cast<const uint8_t*>(p.x) + offset + column * kGroupBytes);
    }
  };
  epilogue.prefetch_early(lane.cluster);
  Vector mine[kColumns]{};
  ptx::wait_for_predecessor();  // nothing but loads from here to the first store
  load_x(first, mine);
  stumble(p, 4);
  const Call call = enter(p, verdict);
  if (call.broken) columns = 0;
  const auto send = [&](uint32_t offset, Vector(&x)[kColumns]) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      x[column] = for_the_wire(p, x[column]);
      if (column < columns) to_others(call.slot + offset + column * kGroupBytes, x[column]);
    }
  };
  stumble(p, 3);
  send(first, mine);
  const uint32_t sent = ptx::clock();
  Vector ahead[kColumns]{};
  const auto send_ahead = [&](uint32_t row) {
    if (Tile::kOnce || row >= p.tokens) return;
    load_x(offset_of(row), ahead);
    send(offset_of(row), ahead);
  };
  send_ahead(lane.cluster + lane.clusters);
  epilogue.prefetch({lane.cluster, 1});
  epilogue.prepare();
  RowCleaner(p, call).step(0, 1);

  while (ptx::clock() - sent < kHopClocks) {
  }
  const uint32_t own = shape.own_too ? kNone : p.rank;
  const uint8_t* const slot = p.block + call.slot;
  for (uint32_t row = lane.cluster, offset = first, round = 0; row < p.tokens; ++round) {
    Vector s[kColumns];
#pragma unroll
    for (Vector& v : s) v = poison_vector<D>();
    if (columns > 0) {
      receive_sum<D, kRanks, kColumns>(p, verdict, slot + offset, source_bytes, columns, own, mine, s);
    }
    const uint32_t next = row + lane.clusters;
    if (Tile::kOnce || next >= p.tokens) ptx::barrier_arrive(kReceived, blockDim.x);
    epilogue.finish({row, 1}, round, s);
    row = next;
    if (Tile::kOnce || row >= p.tokens) break;
    // Not at the head of the loop: a load that the first round skips would wait there for the one before it all the same.
    offset = offset_of(row);
    epilogue.prefetch({row, 1});
#pragma unroll
    for (int column = 0; column < kColumns; ++column) mine[column] = ahead[column];
    send_ahead(row + lane.clusters);
  }
}

}  // namespace mnnvl_ar::cuda
