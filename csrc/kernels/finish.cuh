// What a row goes through once it is summed: an epilogue (epilogues/epilogue.h) over the threads of a cluster.
//
// Contract. Finish<D, Tile, E> sees s of kColumns vectors of kRows rows at a time, row by row, and stores the outputs.
//   * Shared: what a CTA's threads need in shared memory. init(lane): by the exit warp. join_cluster(): by all warps.
//   * prefetch_weight() and prefetch_row(row): have L2 fetch what all rows need and what one will, before the predecessor has
//     ended or long before its turn.
//   * prepare(): loads what does not depend on the row, and waits until all CTAs of the cluster are there; prefetch(rows): loads what
//     does. Both before the wait for peers.
//   * kLean: nothing of the row or the weight is held in registers between finish() and prefetch(), which then loads the weight, too.
//   * finish(rows, round, s): by every thread with rows, whatever it holds, since it may hold barriers. `round` counts the calls of
//     finish() of this cluster. After a fault s is NaN, and so is all that is stored.
#pragma once

#include "epilogues/epilogue.h"
#include "kernels/call.cuh"
#include "kernels/root.cuh"
#include "kernels/row_reduction.cuh"

namespace mnnvl_ar::kernels {

using epilogues::CallOf;
using epilogues::MostOver;
using epilogues::poison_vector;

template <class D, class Tile, class E, bool kLean = false, bool kNormed = E::kNormed>
class Finish;

// Without a norm: each vector is stored as soon as it is summed.
template <class D, class Tile, class E, bool kLean>
class Finish<D, Tile, E, kLean, false> {
 public:
  struct Shared {
    __device__ __forceinline__ void init(const Lane&) {}
    static __device__ __forceinline__ void join_cluster() {}
  };

  __device__ __forceinline__ Finish(const CallOf<E>& p, const Lane& lane, const CallStatus& status, const Shared&)
      : p_(p), lane_(lane), status_(status) {}

  __device__ __forceinline__ void prefetch_weight() const {}
  __device__ __forceinline__ void prefetch_row(uint32_t) const {}
  __device__ __forceinline__ void prepare() { per_call_ = E::prepare(p_.arguments); }
  __device__ __forceinline__ void prefetch(Rows) {}

  __device__ __forceinline__ void finish(Rows rows, uint32_t, protocol::Vector (&s)[Tile::kVectors]) {
    if (!holds_column(p_, lane_, 0)) return;
    const bool poisoned = status_.is_poisoned();
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      const int row = i / Tile::kColumns, column = i % Tile::kColumns;
      if (row >= rows.count || !holds_column(p_, lane_, column)) continue;
      if (poisoned) s[i] = poison_vector<D>();
      const uint32_t offset = vector_offset(p_, rows.first + row, lane_.vector) + column * kGroupBytes;
      E::template store<D>(p_.arguments, per_call_, p_.tensors,
                           {rows.first + row, lane_.vector + column * kGroupVectors, offset}, s[i]);
    }
  }

 private:
  const CallOf<E>& p_;
  const Lane& lane_;
  StatusReader status_;
  typename E::PerCall per_call_;
};

// With residual and norm: the row's sum of squares, then the norm, then, if E asks for it, a maximum of that.
template <class D, class Tile, class E, bool kLean>
class Finish<D, Tile, E, kLean, true> {
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns, kVectors = Tile::kVectors;
  static constexpr uint32_t kExchanges = E::kMostOver == MostOver::row ? 2 : 1;  // of a cluster, a call of finish()

 public:
  using Shared = RowReduction<Tile>;

  __device__ __forceinline__ Finish(const CallOf<E>& p, const Lane& lane, const CallStatus& status,
                                    const Shared& shared)
      : p_(p),
        lane_(lane),
        status_(status),
        reduction_(ptx::keep(ptx::shared_address(&shared))),
        reciprocal_root_(static_cast<float>(p.tensors.vectors * D::kPerVector)) {}

  // A layer's weight was last read a whole model ago. Into L2, not into registers: the predecessor may be the one that writes it.
  __device__ __forceinline__ void prefetch_weight() const {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (holds(column)) ptx::prefetch_to_l2(weight_place(column));
    }
  }

  __device__ __forceinline__ void prefetch_row(uint32_t row) const {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (holds(column)) ptx::prefetch_to_l2(residual_place(row, column));
    }
  }

  // Into registers: the mbarriers in finish() empty L1, and a load behind them would stand alone on the way to the outputs. Four
  // rows at once leave no registers for that over the wait for peers, and load it for all four while they are summed.
  __device__ __forceinline__ void prepare() {
    if (kKeepsWeight) load_weight();
    per_call_ = E::prepare(p_.arguments);
    Shared::await_cluster();
  }

  __device__ __forceinline__ void prefetch(Rows rows) {
    if (kLean) {
      forget(residual_);
#pragma unroll
      for (Weight& weight : weight_) weight = Weight{};
      if (kVectors < 4) load_weight();
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int row = i / kColumns, column = i % kColumns;
      if (row < rows.count && holds(column)) residual_[i] = ptx::load(residual_place(rows.first + row, column));
    }
  }

  __device__ __forceinline__ void finish(Rows rows, uint32_t round, protocol::Vector (&s)[kVectors]) {
    const uint32_t turn = round * kExchanges;
    float square_sum[kVectors] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i / kColumns >= rows.count || !holds(i % kColumns)) continue;
      s[i] = protocol::add_residual<D>(s[i], residual_[i]);
      square_sum[i] = protocol::square_sum<D>(s[i]);
    }
    if (kVectors >= 4) load_weight();
    Shared::exchange_sums(lane_, reduction_, turn, square_sum);
    status_.look();
    float row_sum[kRows];
    Shared::add_up(lane_, reduction_, turn, row_sum);
    float rstd[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) rstd[row] = reciprocal_root_(row_sum[row], p_.arguments.eps);
    uint32_t most[kVectors] = {};
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!holds(column)) continue;
      float factor[D::kPerVector];
      factors(weight_[column], factor);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= rows.count) continue;
        const int i = row * kColumns + column;
        const protocol::Vector norm = protocol::normalize<D>(s[i], rstd[row], factor, p_.arguments.weight_bias);
        const bool poisoned = status_.is_poisoned();
        const epilogues::Place place = place_of(rows, row, column);
        ptx::store(epilogues::at(p_.arguments.residual_out, place.offset), poisoned ? poison_vector<D>() : s[i]);
        const protocol::Vector stored = poisoned ? poison_vector<D>() : norm;
        if constexpr (E::kMostOver != MostOver::nothing) {
          s[i] = stored;
          most[i] = E::template measure<D>(stored);
        } else {
          E::template store<D>(p_.arguments, per_call_, p_.tensors, place, stored, 0);
        }
      }
    }
    Shared::prepare_next(lane_, reduction_, turn);
    if constexpr (E::kMostOver != MostOver::nothing) store_with_most(rows, turn + 1, s, most);
  }

 private:
  static constexpr bool kKeepsWeight = kVectors < 4 && !kLean;
  struct Weight {
    protocol::Vector low, high;  // high: the second four of eight fp32 factors
  };

  __device__ __forceinline__ void store_with_most(Rows rows, uint32_t turn, const protocol::Vector (&norm)[kVectors],
                                                  uint32_t (&most)[kVectors]) {
    if constexpr (E::kMostOver == MostOver::row) {
      Shared::exchange_maxima(lane_, reduction_, turn, most);
      uint32_t row_most[kRows];
      Shared::max_up(lane_, reduction_, turn, row_most);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) most[i] = row_most[i / kColumns];
    } else {
      Shared::max_in_blocks(E::block_vectors(p_.arguments), most);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int row = i / kColumns, column = i % kColumns;
      if (row >= rows.count || !holds(column)) continue;
      E::template store<D>(p_.arguments, per_call_, p_.tensors, place_of(rows, row, column), norm[i], most[i]);
    }
    if constexpr (E::kMostOver == MostOver::row) Shared::prepare_next(lane_, reduction_, turn);
  }

  __device__ __forceinline__ bool holds(int column) const { return holds_column(p_, lane_, column); }

  __device__ __forceinline__ epilogues::Place place_of(Rows rows, int row, int column) const {
    return {rows.first + row, lane_.vector + column * kGroupVectors,
            vector_offset(p_, rows.first + row, lane_.vector) + column * kGroupBytes};
  }

  __device__ __forceinline__ const uint8_t* residual_place(uint32_t row, int column) const {
    return static_cast<const uint8_t*>(p_.arguments.residual) + vector_offset(p_, row, lane_.vector) +
           column * kGroupBytes;
  }

  __device__ __forceinline__ const uint8_t* weight_place(int column) const {
    const uint32_t weight_bytes = p_.arguments.weight_is_fp32 ? D::kPerVector * 4 : protocol::kVectorBytes;
    return static_cast<const uint8_t*>(p_.arguments.weight) + (lane_.vector + column * kGroupVectors) * weight_bytes;
  }

  __device__ __forceinline__ void load_weight() {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if constexpr (Tile::kOnce) {
        ptx::load_if(holds(column), weight_place(column), weight_[column].low);
        if (D::kPerVector == 8) {
          ptx::load_if(holds(column) && p_.arguments.weight_is_fp32, weight_place(column) + 16, weight_[column].high);
        }
        continue;
      }
      if (!holds(column)) continue;
      weight_[column].low = ptx::load(weight_place(column));
      if (D::kPerVector == 8 && p_.arguments.weight_is_fp32) {
        weight_[column].high = ptx::load(weight_place(column) + 16);
      }
    }
  }

  __device__ __forceinline__ void factors(Weight& weight, float (&factor)[D::kPerVector]) const {
    // Without this the compiler computes them, and waits for the weight, before the first look for peers' data.
    ptx::not_before(weight.low);
    ptx::not_before(weight.high);
#pragma unroll
    for (int i = 0; i < D::kPerVector; ++i) {
      const uint32_t word = i < 4 ? weight.low.word[i % 4] : weight.high.word[i % 4];
      factor[i] = D::kPerVector == 4 || p_.arguments.weight_is_fp32 ? protocol::as_float(word) : D::load(weight.low, i);
    }
  }

  const CallOf<E>& p_;
  const Lane& lane_;
  StatusReader status_;
  const uint32_t reduction_;
  const ReciprocalRoot reciprocal_root_;
  typename E::PerCall per_call_;
  Weight weight_[kColumns]{};
  protocol::Vector residual_[kVectors];
};

}  // namespace mnnvl_ar::kernels
