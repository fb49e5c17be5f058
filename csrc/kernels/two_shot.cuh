// Two-shot: columns are split over owners. Every rank sends each owner its columns; owners sum and send on to all; each rank
// applies the epilogue to whole rows. Two hops, but 2 (R - 1) / R of the bytes on the link instead of R - 1.
//
// Launched like one-shot, but clusters take batches of `batch` neighbouring rows, so that the owners' share of a batch fills
// their threads. Three stages a batch: scatter, reduce, gather. Each stage runs `lag` batches behind the one before it, so
// that the link is busy while data is awaited. A stage waits only for what peers send in earlier batches' or earlier
// stages' steps (rule R5), so any grids on any ranks go together. kRows rows are loaded, awaited and normed at once.
#pragma once

#include "kernels/entry_warp.cuh"
#include "kernels/exit_warp.cuh"
#include "kernels/fanout.cuh"
#include "kernels/finish.cuh"
#include "kernels/receive.cuh"
#include "kernels/refuse.cuh"

namespace mnnvl_ar::kernels {

template <class D, int kRanks, class Tile, class E>
__global__ void __launch_bounds__(kMaxThreads, 1) two_shot(const __grid_constant__ CallOf<E> p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if constexpr (Tile::kRows == 4) return __trap();  // never planned here: launch/form.h, is_built
#endif
  // ---- Set-up: what the CTA shares, and the warps without rows go their own way.
  constexpr int kRows = Tile::kRows;
  using Epilogue = Finish<D, Tile, E, kRanks == 0>;
  __shared__ CallStatus status;
  __shared__ typename Epilogue::Shared shared;
  const Lane lane = this_lane<1>();
  const protocol::Shape shape{p.group.ranks, p.tensors.tokens, p.tensors.vectors};
  if (lane.role == Role::entry) {  // as in one-shot: what is longest on its way first, in registers of this role alone
    RingWords words{};
    read_ring_if(!p.launch.programmatic, p.group.block, words);
    if (!is_as_planned<false>(p)) return refuse<D, E>(p);
    shared.join_cluster();
    const auto dirty = static_cast<uint32_t>(protocol::two_shot_vectors(shape));
    return run_entry_warp<E::kNormed>(p, dirty, status, words);
  }
  if (!is_as_planned<false>(p)) return refuse<D, E>(p);
  if (lane.role == Role::exit) return run_exit_warp<E>(p, lane, status, shared);
  shared.join_cluster();

  // ---- Before the predecessor has ended: addresses, and prefetches into L2 of what it does not write.
  const uint32_t width = protocol::owned_columns(shape);
  const uint32_t owner = min(lane.vector / width, p.group.ranks - 1);  // columns behind the row's end have none
  const uint32_t owned_column = lane.vector - owner * width;
  const uint64_t owner_block = ptx::keep(reinterpret_cast<uint64_t>(p.group.block_of(owner)));
  const uint32_t tokens = p.tensors.tokens, batch_rows = p.launch.shape.batch, lag = p.launch.shape.lag;
  const uint32_t rows_apart = lane.clusters * batch_rows;
  const uint32_t batches = ptx::keep((tokens - lane.cluster * batch_rows + rows_apart - 1) / rows_apart);
  const auto first_row = [&](uint32_t batch) { return batch * rows_apart + lane.cluster * batch_rows; };
  const auto end_row = [&](uint32_t batch) { return min(first_row(batch) + batch_rows, tokens); };
  const auto input = [&](uint32_t row) {
    return ptx::load(static_cast<const uint8_t*>(p.tensors.x) + vector_offset(p, row, lane.vector));
  };
  Epilogue epilogue(p, lane, status, shared);
  epilogue.prefetch_weight();
  epilogue.prefetch_row(first_row(0));

  // ---- Enter: the predecessor has ended; load the first row while the entry warp reads the state. Only loads up to the send.
  ptx::wait_for_predecessor();
  Vector first_x{};
  if (holds_column(p, lane, 0)) first_x = input(first_row(0));
  random_delay(p, Step::enter);
  const RingPosition ring = enter(p, status);
  const bool active = holds_column(p, lane, 0) && !ring.broken;

  // ---- Stage 1, scatter: each owner gets its columns.
  const auto scatter_one = [&](uint32_t row, const Vector& x) {
    const auto position = static_cast<uint32_t>(protocol::scatter_position(shape, p.group.rank, row, owned_column));
    auto* const place = reinterpret_cast<uint8_t*>(owner_block) + ring.slot + position * protocol::kVectorBytes;
    ptx::store_relaxed_sys(place, for_the_wire(p, x));
  };
  const auto scatter = [&](uint32_t batch) {
    if (!active) return;
    uint32_t row = first_row(batch);
    const uint32_t end = end_row(batch);
    if constexpr (kRanks > 0) {
      if (batch == 0) scatter_one(row++, first_x);
    } else {
      row += batch == 0;  // sent before
    }
    for (; row < end; row += kRows) {
      Vector x[kRows];
      if (kRanks == 0) forget(x);  // or else it takes registers from the sixteen sources
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (row + i < end) x[i] = input(row + i);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (row + i < end) scatter_one(row + i, x[i]);
      }
    }
  };

  // Of any number of ranks: at once, so that no loop holds it in registers.
  if (kRanks == 0 && active) scatter_one(first_row(0), first_x);

  // ---- Stage 2, reduce: own columns of every rank are summed, and the sum is sent to all ranks. Neighbouring groups of 32 items are
  // in different CTAs, so that few items keep all SMs busy.
  const auto first_item = [&] { return (threadIdx.x / 32 * gridDim.x + blockIdx.x) * 32 + threadIdx.x % 32; };
  const auto reduce = [&](uint32_t batch) {
    if (ring.broken) return;
    const uint32_t own_columns = protocol::columns_of(shape, p.group.rank);
    const uint32_t first = first_row(batch), items = (end_row(batch) - first) * own_columns;
    for (uint32_t item = first_item(); item < items; item += lane.groups * 32) {
      const uint32_t row = first + item / own_columns, own = item % own_columns;
      const uint32_t source = static_cast<uint32_t>(protocol::scatter_position(shape, 0, row, own));
      const uint8_t* place = p.group.block + ring.slot + source * protocol::kVectorBytes;
      Vector s[1];
      // A sum that is not one is not sent: who waits for it is told of the fault, and takes no NaN for data.
      const uint32_t source_bytes = p.tensors.tokens * width * protocol::kVectorBytes;
      if (!receive_sum<D, kRanks, 1>(p, status, place, source_bytes, 1, kNone, {{}}, s, [] {})) continue;
      const uint32_t position =
          static_cast<uint32_t>(protocol::gather_position(shape, row, p.group.rank * width + own));
      send_to_all<kRanks>(p, ring.slot + position * protocol::kVectorBytes, for_the_wire(p, s[0]));
    }
  };

  // ---- Stage 3, gather: whole rows of sums arrive, and the epilogue stores the outputs.
  uint32_t round = 0;
  const uint32_t row_bytes = p.tensors.vectors * protocol::kVectorBytes;
  const auto gather = [&](uint32_t batch) {
    for (uint32_t row = first_row(batch), end = end_row(batch); row < end; row += kRows, ++round) {
      const Rows rows{row, min(end - row, static_cast<uint32_t>(kRows))};
      epilogue.prefetch(rows);
      Vector s[kRows];
      if (kRanks == 0) forget(s);
      bool ok = active;
      if (active) {
        const uint32_t position = static_cast<uint32_t>(protocol::gather_position(shape, row, lane.vector));
        ok = receive<kRows, 1>(p, status, p.group.block + ring.slot + position * protocol::kVectorBytes, row_bytes,
                               rows.count, 1, s);
      }
      if (!ok) {
#pragma unroll
        for (Vector& v : s) v = poison_vector<D>();
      }
      if (batch + 1 == batches && row + kRows >= end) ptx::barrier_arrive(kReceived, blockDim.x);
      epilogue.finish(rows, round, s);
    }
  };

  // ---- Each stage runs `lag` batches behind the one before it.
  for (uint32_t step = 0; step < batches + 2 * lag; ++step) {
    if (step < batches) scatter(step);
    if (step == 0) {
      random_delay(p, Step::before_wait);
      epilogue.prepare();
    }
    if (step < batches) clear_step(p, ring, step, batches);
    if (step >= lag && step - lag < batches) reduce(step - lag);
    if (step >= 2 * lag) gather(step - 2 * lag);
  }
}

}  // namespace mnnvl_ar::kernels
