// What is fused after the sum. An epilogue sees s of kColumns vectors of kRows rows at a time, row by row, and stores the
// outputs.
//
// An epilogue has
//   * kOp, what peers are told; Shared, with init(lane) by all threads before the cluster is synchronised;
//   * prefetch_weight() and prefetch_row(row): have L2 fetch what all rows need and what one will, before the kernel ahead has
//     ended or long before its turn;
//   * prepare(): loads what does not depend on the row; prefetch(rows): loads what does, issued before the wait for peers;
//   * holds(column): whether that column of the thread lies in the row;
//   * finish(rows, round, s): called by every thread with rows, whatever it holds, since it may hold barriers. After a fault s is
//     NaN, and so is all that is stored.
// A quantised output is a function of `norm` as stored: a new epilogue is RmsNorm with another store().
#pragma once

#include "cuda/call.cuh"
#include "cuda/root.cuh"
#include "cuda/row.cuh"
#include "cuda/shape.cuh"

namespace mnnvl_ar::cuda {

// Of a thread's first column. In bytes, in a tensor of the call: 32 bits, since what fits a slot is smaller than 4 GiB
// (protocol::kMaxSlotBytes).
__device__ __forceinline__ uint32_t vector_offset(const Params& p, uint32_t row, uint32_t vector) {
  return (row * p.vectors + vector) * protocol::kVectorBytes;
}

__device__ __forceinline__ bool holds_column(const Params& p, const Lane& lane, int column) {
  return lane.vector + column * kGroupVectors < p.vectors;
}

// `count` of kRows rows, from `first` on; the others are not there.
struct Rows {
  uint32_t first;
  uint32_t count;
};

template <class D, class Tile>
class Plain {
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;

 public:
  static constexpr protocol::Op kOp = protocol::Op::all_reduce;
  struct Shared {
    __device__ __forceinline__ void init(const Lane&) {}
  };

  __device__ __forceinline__ Plain(const Params& p, const Lane& lane, const Verdict& verdict, const Shared&)
      : p_(p), lane_(lane), decided_(verdict) {}

  __device__ __forceinline__ bool holds(int column) const { return holds_column(p_, lane_, column); }
  __device__ __forceinline__ void prefetch_weight() const {}
  __device__ __forceinline__ void prefetch_row(uint32_t) const {}
  __device__ __forceinline__ void prepare() {}
  __device__ __forceinline__ void prefetch(Rows) {}
  __device__ __forceinline__ void finish(Rows rows, uint32_t, protocol::Vector (&s)[Tile::kVectors]) {
    if (!holds(0)) return;
    const bool poisoned = decided_.is_poisoned();
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      const int row = i / kColumns, column = i % kColumns;
      if (row >= rows.count || !holds(column)) continue;
      if (poisoned) s[i] = poison_vector<D>();
      const uint32_t offset = vector_offset(p_, rows.first + row, lane_.vector) + column * kGroupBytes;
      ptx::store(static_cast<uint8_t*>(p_.out) + offset, s[i]);
    }
  }

 private:
  const Params& p_;
  const Lane& lane_;
  VerdictWait decided_;
};

template <class D, class Tile>
class RmsNorm {
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;

 public:
  static constexpr protocol::Op kOp = protocol::Op::all_reduce_rms_norm;
  using Shared = RowSum<Tile>;

  __device__ __forceinline__ RmsNorm(const Params& p, const Lane& lane, const Verdict& verdict, const Shared& shared)
      : p_(p),
        lane_(lane),
        decided_(verdict),
        sums_(ptx::keep(ptx::shared_address(&shared))),
        reciprocal_root_(static_cast<float>(p.vectors * D::kPerVector)) {}

  __device__ __forceinline__ bool holds(int column) const { return holds_column(p_, lane_, column); }

  // A layer's weight was last read a whole model ago. Into L2, not into registers: the kernel ahead may be the one that writes it.
  __device__ __forceinline__ void prefetch_weight() const {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (holds(column)) ptx::prefetch_to_l2(weight_place(column));
    }
  }

  __device__ __forceinline__ void prefetch_row(uint32_t row) const {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!holds(column)) continue;
      ptx::prefetch_to_l2(static_cast<const uint8_t*>(p_.residual) + vector_offset(p_, row, lane_.vector) +
                          column * kGroupBytes);
    }
  }

  // Into registers: the mbarriers in finish() empty L1, and a load behind them would stand alone on the way to the outputs. Four
  // rows at once leave no registers for that over the wait for peers, and load it for all four while they are summed.
  __device__ __forceinline__ void prepare() {
    if (kKeepsWeight) load_weight();
  }

  __device__ __forceinline__ void prefetch(Rows rows) {
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      const int row = i / kColumns, column = i % kColumns;
      if (row < rows.count && holds(column)) {
        residual_[i] = ptx::load(static_cast<const uint8_t*>(p_.residual) +
                                 vector_offset(p_, rows.first + row, lane_.vector) + column * kGroupBytes);
      }
    }
  }

  __device__ __forceinline__ void finish(Rows rows, uint32_t round, protocol::Vector (&s)[Tile::kVectors]) {
    float square_sum[Tile::kVectors] = {};
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      if (i / kColumns >= rows.count || !holds(i % kColumns)) continue;
      s[i] = protocol::add_residual<D>(s[i], residual_[i]);
      square_sum[i] = protocol::square_sum<D>(s[i]);
    }
    if (!kKeepsWeight) load_weight();
    Shared::gather(lane_, sums_, round, square_sum);
    decided_.look();
    float row_sum[kRows];
    Shared::add_up(lane_, sums_, round, row_sum);
    float rstd[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) rstd[row] = reciprocal_root_(row_sum[row], p_.eps);
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!holds(column)) continue;
      float factor[D::kPerVector];
      factors(weight_[column], factor);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= rows.count) continue;
        const int i = row * kColumns + column;
        const protocol::Vector norm = protocol::normalize<D>(s[i], rstd[row], factor, p_.weight_bias);
        const bool poisoned = decided_.is_poisoned();
        const uint32_t offset = vector_offset(p_, rows.first + row, lane_.vector) + column * kGroupBytes;
        store(offset, poisoned ? poison_vector<D>() : s[i], poisoned ? poison_vector<D>() : norm);
      }
    }
    Shared::prepare_next(lane_, sums_, round);
  }

 private:
  static constexpr bool kKeepsWeight = Tile::kVectors < 4;
  struct Weight {
    protocol::Vector low, high;  // high: the second four of eight fp32 factors
  };

  __device__ __forceinline__ const uint8_t* weight_place(int column) const {
    const uint32_t weight_bytes = p_.weight_is_fp32 ? D::kPerVector * 4 : protocol::kVectorBytes;
    return static_cast<const uint8_t*>(p_.weight) + (lane_.vector + column * kGroupVectors) * weight_bytes;
  }

  __device__ __forceinline__ void load_weight() {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (!holds(column)) continue;
      weight_[column].low = ptx::load_constant(weight_place(column));
      if (D::kPerVector == 8 && p_.weight_is_fp32) weight_[column].high = ptx::load_constant(weight_place(column) + 16);
    }
  }

  __device__ __forceinline__ void factors(Weight& weight, float (&factor)[D::kPerVector]) const {
    // Or else the compiler computes them, and waits for the weight, before the first look for peers' data.
    ptx::not_before(weight.low);
    ptx::not_before(weight.high);
#pragma unroll
    for (int i = 0; i < D::kPerVector; ++i) {
      const uint32_t word = i < 4 ? weight.low.word[i % 4] : weight.high.word[i % 4];
      factor[i] = D::kPerVector == 4 || p_.weight_is_fp32 ? protocol::as_float(word) : D::load(weight.low, i);
    }
  }

  __device__ __forceinline__ void store(uint32_t offset, const protocol::Vector& z,
                                        const protocol::Vector& norm) const {
    ptx::store(static_cast<uint8_t*>(p_.residual_out) + offset, z);
    ptx::store(static_cast<uint8_t*>(p_.out) + offset, norm);
  }

  const Params& p_;
  const Lane& lane_;
  VerdictWait decided_;
  const uint32_t sums_;
  const ReciprocalRoot reciprocal_root_;
  Weight weight_[kColumns]{};
  protocol::Vector residual_[Tile::kVectors];
};

}  // namespace mnnvl_ar::cuda
