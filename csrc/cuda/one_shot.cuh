// One-shot: every rank sends its rows to all others, each rank sums, and applies the epilogue. One hop.
//
// Launched with clusters that each hold a row (row.cuh); cluster c works on rows c, c + clusters, ... Where all rows have a
// cluster (Tile::kOnce) that is all. All ranks take rows in rising order: no cluster waits for a row before it has sent it, and
// all lower ones of its own, so whatever the grids, the lowest row that anybody waits for has been sent (rule R5). Rows of a
// large call leave at the pace of the link (pace.h), so that what has come is summed while the link is busy.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/fanout.cuh"
#include "cuda/receive.cuh"

namespace mnnvl_ar::cuda {

// Until `clocks` after `since`.
__device__ __forceinline__ void await_clock(uint32_t since, uint32_t clocks) {
  while (ptx::clock() - since < clocks) {
  }
}

// CTAs of full size that an SM is to hold at once: where rows queue up for two ranks, the link is busy with as many as fit.
template <int kRanks, class Tile>
inline constexpr int kCtas = kRanks == 2 && !Tile::kOnce ? 2 : 1;

template <class Tile>
inline constexpr int kThreads = !Tile::kOnce && Tile::kColumns == 2 ? kTwoColumnThreads : kMaxThreads;

template <class D, int kRanks, class Tile, template <class, class> class Epilogue>
__global__ void __launch_bounds__(kThreads<Tile>, kCtas<kRanks, Tile>) one_shot(const __grid_constant__ Params p) {
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
  uint32_t columns = 0;
#pragma unroll
  for (int column = 0; column < kColumns; ++column) columns += epilogue.holds(column);
  const auto load_x = [&](uint32_t offset, Vector(&x)[kColumns]) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (column < columns) x[column] = ptx::load(static_cast<const uint8_t*>(p.x) + offset + column * kGroupBytes);
    }
  };
  const auto fetch_x = [&](uint32_t offset) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (column < columns) ptx::prefetch_to_l2(static_cast<const uint8_t*>(p.x) + offset + column * kGroupBytes);
    }
  };
  epilogue.prefetch_weight();
  epilogue.prefetch_row(lane.cluster);
  if (threadIdx.x % 32 == 0) fetch_x(first);  // for the translation of its address: x itself is being written
  Vector mine[kColumns]{};
  ptx::wait_for_predecessor();  // nothing but loads from here to the first store
  const uint32_t began = ptx::clock();
  load_x(first, mine);
  stumble(p, 4);
  const Call call = enter(p, verdict);
  if (call.broken) columns = 0;
  const uint32_t own = shape.own_too ? kNone : p.rank;
  const uint8_t* const slot = p.block + call.slot;
  stumble(p, 3);

  const uint32_t rounds = Tile::kOnce ? 1 : (p.tokens - lane.cluster + lane.clusters - 1) / lane.clusters;
  for (uint32_t row = lane.cluster, offset = first, round = 0;; ++round) {
    await_clock(began, row * p.row_clocks);
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      mine[column] = for_the_wire(p, mine[column]);
      if (column < columns) to_others(call.slot + offset + column * kGroupBytes, mine[column]);
    }
    const uint32_t sent = ptx::clock();
    epilogue.prefetch({row, 1});
    if (round == 0) epilogue.prepare();
    clear_step(p, call, round, rounds);
    const uint32_t next = row + lane.clusters;
    const bool is_last = Tile::kOnce || next >= p.tokens;
    if (!is_last) {
      epilogue.prefetch_row(next);
      fetch_x(vector_offset(p, next, lane.vector));
    }
    await_clock(sent, p.first_look_clocks);
    Vector s[kColumns];
#pragma unroll
    for (Vector& v : s) v = poison_vector<D>();
    if (columns > 0) {
      receive_sum<D, kRanks, kColumns>(p, verdict, slot + offset, source_bytes, columns, own, mine, s);
    }
    if (is_last) {
      ptx::barrier_arrive(kReceived, blockDim.x);
    } else {
      offset = vector_offset(p, next, lane.vector);
      load_x(offset, mine);
    }
    epilogue.finish({row, 1}, round, s);
    if (is_last) break;
    row = next;
  }
}

}  // namespace mnnvl_ar::cuda
