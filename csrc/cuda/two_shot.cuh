// Two-shot: columns are split over owners. Every rank sends each owner its columns; owners sum and send on to all; each rank
// applies the epilogue to whole rows. Two hops, but 2 (R - 1) / R of the bytes on the link instead of R - 1.
//
// Launched like one-shot, but clusters take batches of `batch` neighbouring rows, so that the owners' share of a batch fills
// their threads. Three stages a batch: scatter, reduce, gather. Each stage runs `lag` batches behind the one before it, so
// that the link is busy while data is awaited. A stage waits only for what peers send in earlier batches' or earlier
// stages' steps (rule R5), so any grids on any ranks go together. kRows rows are loaded, awaited and normed at once.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/fanout.cuh"
#include "cuda/receive.cuh"

namespace mnnvl_ar::cuda {

template <class D, int kRanks, int kMostRows, template <class, class> class Epilogue>
__global__ void __launch_bounds__(kMaxThreads, 1) two_shot(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr int kRows = kMostRows < 2 ? kMostRows : 2;  // ptxas spills at 4 for these
#else
  constexpr int kRows = kMostRows == 4 && kRanks == 8 ? 2 : kMostRows;  // the same for 8 ranks
#endif
  __shared__ Verdict verdict;
  __shared__ typename Epilogue<D, Tile<kRows>>::Shared shared;
  const Lane lane = this_lane<1>();
  prepare_cta(lane, verdict, shared);
  const protocol::Shape shape{p.ranks, p.tokens, p.vectors};
  const uint32_t width = protocol::owned_columns(shape);
  const uint32_t owner = lane.vector / width;
  const uint32_t rows_apart = lane.clusters * p.batch;
  const uint32_t batches = (p.tokens - lane.cluster * p.batch + rows_apart - 1) / rows_apart;
  const auto first_row = [&](uint32_t batch) { return batch * rows_apart + lane.cluster * p.batch; };
  const auto end_row = [&](uint32_t batch) { return min(first_row(batch) + p.batch, p.tokens); };
  const auto input = [&](uint32_t row) {
    return ptx::load(static_cast<const uint8_t*>(p.x) + vector_offset(p, row, lane.vector));
  };

  if (!is_as_planned<false>(p)) return refuse<D>(p);
  if (lane.role != Role::row) {
    return keep_books(p, lane, static_cast<uint32_t>(protocol::two_shot_vectors(shape)), verdict);
  }
  Epilogue<D, Tile<kRows>> epilogue(p, lane, verdict, shared);
  epilogue.prefetch_weight();
  epilogue.prefetch_row(first_row(0));
  ptx::wait_for_predecessor();  // nothing but loads from here to the first store
  Vector first_x{};
  if (epilogue.holds(0)) first_x = input(first_row(0));
  stumble(p, 4);
  const Call call = enter(p, verdict);
  const bool active = epilogue.holds(0) && !call.broken;

  const auto scatter_one = [&](uint32_t row, const Vector& x) {
    const uint32_t column = lane.vector - owner * width;
    const uint32_t position = static_cast<uint32_t>(protocol::scatter_position(shape, p.rank, row, column));
    ptx::store_relaxed_sys(block_of(p, owner) + call.slot + position * protocol::kVectorBytes, for_the_wire(p, x));
  };
  const auto scatter = [&](uint32_t batch) {
    if (!active) return;
    uint32_t row = first_row(batch);
    const uint32_t end = end_row(batch);
    if (batch == 0) scatter_one(row++, first_x);
    for (; row < end; row += kRows) {
      Vector x[kRows];
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

  // Neighbouring groups of 32 in different CTAs: few items are to keep all SMs busy.
  const auto first_item = [&] { return (threadIdx.x / 32 * gridDim.x + blockIdx.x) * 32 + threadIdx.x % 32; };
  const auto reduce = [&](uint32_t batch) {
    if (call.broken) return;
    const uint32_t own_columns = protocol::columns_of(shape, p.rank);
    const uint32_t first = first_row(batch), items = (end_row(batch) - first) * own_columns;
    for (uint32_t item = first_item(); item < items; item += lane.groups * 32) {
      const uint32_t row = first + item / own_columns, own = item % own_columns;
      const uint32_t source = static_cast<uint32_t>(protocol::scatter_position(shape, 0, row, own));
      const uint8_t* place = p.block + call.slot + source * protocol::kVectorBytes;
      Vector s[1];
      receive_sum<D, kRanks, 1>(p, verdict, place, p.tokens * width * protocol::kVectorBytes, 1, kNone, {{}}, s);
      const uint32_t position = static_cast<uint32_t>(protocol::gather_position(shape, row, p.rank * width + own));
      send_to_all<kRanks>(p, call.slot + position * protocol::kVectorBytes, for_the_wire(p, s[0]));
    }
  };

  uint32_t round = 0;
  const uint32_t row_bytes = p.vectors * protocol::kVectorBytes;
  const auto gather = [&](uint32_t batch) {
    for (uint32_t row = first_row(batch), end = end_row(batch); row < end; row += kRows, ++round) {
      const Rows rows{row, min(end - row, static_cast<uint32_t>(kRows))};
      epilogue.prefetch(rows);
      Vector s[kRows];
      bool ok = active;
      if (active) {
        const uint32_t position = static_cast<uint32_t>(protocol::gather_position(shape, row, lane.vector));
        ok = receive<kRows, 1>(p, verdict, p.block + call.slot + position * protocol::kVectorBytes, row_bytes,
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

  for (uint32_t step = 0; step < batches + 2 * p.lag; ++step) {
    if (step < batches) scatter(step);
    if (step == 0) {
      stumble(p, 3);
      epilogue.prepare();
    }
    if (step < batches) clear_step(p, call, step, batches);
    if (step >= p.lag && step - p.lag < batches) reduce(step - p.lag);
    if (step >= 2 * p.lag) gather(step - 2 * p.lag);
  }
}

}  // namespace mnnvl_ar::cuda
