// One-shot: every rank sends its rows to all others, each rank sums, and applies the epilogue. One hop.
//
// Launched with clusters that each hold a row (row.cuh); cluster c works on rows c, c + clusters, ... Where all rows have a
// cluster (Tile::kOnce) that is all. All ranks take rows in rising order: no cluster waits for a row before it has sent it, and
// all lower ones of its own, so whatever the grids, the lowest row that anybody waits for has been sent (rule R5). Rows of a
// large call leave at the pace of the link (launch/pace.h), so that what has come is summed while the link is busy.
#pragma once

#include "kernels/entry_warp.cuh"
#include "kernels/exit_warp.cuh"
#include "kernels/fanout.cuh"
#include "kernels/finish.cuh"
#include "kernels/receive.cuh"
#include "kernels/refuse.cuh"

namespace mnnvl_ar::kernels {

// Until `clocks` after `since`.
__device__ __forceinline__ void await_clock(uint32_t since, uint32_t clocks) {
  while (ptx::clock() - since < clocks) {
  }
}

// CTAs of full size that an SM is to hold at once: where rows queue up for two ranks, the link is busy with as many as fit.
template <int kRanks, class Tile>
inline constexpr int kCtas = kRanks == 2 && !Tile::kOnce ? 2 : 1;

template <int kRanks, class Tile>
inline constexpr int kThreads = !Tile::kOnce && Tile::kColumns == 2                                  ? kTwoColumnThreads
                                : Tile::kOnce && Tile::kColumns == 1 && (kRanks == 2 || kRanks == 4) ? kRowThreads
                                                                                                     : kMaxThreads;

template <class D, int kRanks, class Tile, class E>
__global__ void __launch_bounds__(kThreads<kRanks, Tile>, kCtas<kRanks, Tile>)
    one_shot(const __grid_constant__ CallOf<E> p) {
  constexpr int kColumns = Tile::kColumns;
  __shared__ CallStatus status;
  __shared__ typename Finish<D, Tile, E>::Shared shared;
  const Lane lane = this_lane<kColumns>();
  const uint32_t first = ptx::keep(vector_offset(p, lane.cluster, lane.vector));
  uint32_t columns = 0;
#pragma unroll
  for (int column = 0; column < kColumns; ++column) columns += holds_column(p, lane, column);
  const auto load_x = [&](uint32_t offset, Vector(&x)[kColumns]) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (column >= columns) continue;
      x[column] = ptx::load(static_cast<const uint8_t*>(p.tensors.x) + offset + column * kGroupBytes);
    }
  };
  const auto fetch_x = [&](uint32_t offset) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (column >= columns) continue;
      ptx::prefetch_to_l2(static_cast<const uint8_t*>(p.tensors.x) + offset + column * kGroupBytes);
    }
  };

  // ---- What is longest on its way is asked for first, if it is there: nothing is awaited behind a plain edge, and pieces of a call
  // do not write what the next one reads. Each role from here on by itself: what they hold is never in the same registers, or
  // where two ways meet it would be awaited.
  const protocol::Shape shape{p.group.ranks, p.tensors.tokens, p.tensors.vectors, p.group.multicast != nullptr};
  if (lane.role == Role::entry) {
    RingWords words{};
    read_ring_if(!p.launch.programmatic, p.group.block, words);
    if (!is_as_planned<Tile::kOnce>(p)) return refuse<D, E>(p);
    shared.join_cluster();
    const auto dirty = static_cast<uint32_t>(protocol::one_shot_vectors(shape));
    return run_entry_warp<E::kNormed>(p, dirty, status, words);
  }
  Vector mine[kColumns]{};
  const bool has_x = !p.launch.programmatic || p.tensors.first_token != 0;
  if (lane.role == Role::row && has_x && lane.cluster < p.tensors.tokens) load_x(first, mine);
  if (!is_as_planned<Tile::kOnce>(p)) return refuse<D, E>(p);
  if (lane.role == Role::exit) return run_exit_warp<E>(p, lane, status, shared);
  shared.join_cluster();

  // ---- Before the predecessor has ended: addresses, and prefetches into L2 of what it does not write.
  Finish<D, Tile, E> epilogue(p, lane, status, shared);
  const uint32_t source_bytes = p.tensors.tokens * p.tensors.vectors * protocol::kVectorBytes;
  const Sender<kRanks> to_others(p, source_bytes);
  epilogue.prefetch_weight();
  epilogue.prefetch_row(lane.cluster);
  if (!has_x && threadIdx.x % 32 == 0) fetch_x(first);  // for the translation of its address: x itself is being written

  // ---- Enter: the predecessor has ended; load the first row while the entry warp reads the state. Only loads up to the send.
  ptx::wait_for_predecessor();
  const uint32_t began = ptx::clock();
  if (!has_x) load_x(first, mine);
  random_delay(p, Step::enter);
  const RingPosition ring = enter(p, status);
  if (ring.broken) columns = 0;
  const uint32_t own = shape.own_too ? kNone : p.group.rank;
  const uint8_t* const slot = p.group.block + ring.slot;
  random_delay(p, Step::before_wait);

  const uint32_t rounds = Tile::kOnce ? 1 : (p.tensors.tokens - lane.cluster + lane.clusters - 1) / lane.clusters;
  for (uint32_t row = lane.cluster, offset = first, round = 0;; ++round) {
    // ---- Send the row, sanitised, to every other rank.
    if (p.launch.pace.row != 0) await_clock(began, row * p.launch.pace.row);
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      mine[column] = for_the_wire(p, mine[column]);
      if (column < columns) to_others(ring.slot + offset + column * kGroupBytes, mine[column]);
    }

    // ---- While the rows of peers are on their way: load the epilogue's inputs, clear a part of the stale slot.
    const uint32_t sent = ptx::clock();
    epilogue.prefetch({row, 1});
    if (round == 0) epilogue.prepare();
    clear_step(p, ring, round, rounds);
    const uint32_t next = row + lane.clusters;
    const bool is_last = Tile::kOnce || next >= p.tensors.tokens;
    if (!is_last) {
      epilogue.prefetch_row(next);
      fetch_x(vector_offset(p, next, lane.vector));
    }

    // ---- Receive: poll own slot until the row of every peer is there, and sum in rank order.
    const auto before_look = [&] { await_clock(sent, p.launch.pace.first_look); };
    if (kRanks > 0) before_look();
    Vector s[kColumns];
#pragma unroll
    for (Vector& v : s) v = poison_vector<D>();
    if (columns > 0) {
      receive_sum<D, kRanks, kColumns>(p, status, slot + offset, source_bytes, columns, own, mine, s, before_look);
    }
    if (is_last) {
      ptx::barrier_arrive(kReceived, blockDim.x);
    } else {
      offset = vector_offset(p, next, lane.vector);
      load_x(offset, mine);
    }

    // ---- Finish: the epilogue stores the outputs.
    epilogue.finish({row, 1}, round, s);
    if (is_last) break;
    row = next;
  }
}

}  // namespace mnnvl_ar::kernels
