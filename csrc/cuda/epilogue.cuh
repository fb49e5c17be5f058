// What is fused after the sum. An epilogue sees s of one vector of kRows rows at a time, and stores the outputs.
//
// An epilogue has
//   * kOp, what peers are told; Shared, with init(lane) by all threads before the cluster is synchronised;
//   * prefetch_early(row): has L2 fetch what the first row will need, before the kernel ahead has ended;
//   * prepare(): loads what does not depend on the row; prefetch(rows): loads what does, issued before the wait for peers;
//   * finish(rows, round, s): called by every thread with rows, `active` or not, since it may hold barriers. After a fault s is
//     NaN, and so is all that is stored.
// A quantised output is a function of `norm` as stored: a new epilogue is RmsNorm with another store().
#pragma once

#include "cuda/call.cuh"
#include "cuda/root.cuh"
#include "cuda/row.cuh"
#include "cuda/shape.cuh"

namespace mnnvl_ar::cuda {

// In bytes, in a tensor of the call: 32 bits, since what fits a slot is smaller than 4 GiB (protocol::kMaxSlotBytes).
__device__ __forceinline__ uint32_t vector_offset(const Params& p, uint32_t row, uint32_t vector) {
  return (row * p.vectors + vector) * protocol::kVectorBytes;
}

// `count` of kRows rows, from `first` on; the others are not there.
struct Rows {
  uint32_t first;
  uint32_t count;
};

template <class D, int kRows>
class Plain {
 public:
  static constexpr protocol::Op kOp = protocol::Op::all_reduce;
  struct Shared {
    __device__ __forceinline__ void init(const Lane&) {}
  };

  __device__ __forceinline__ Plain(const Params& p, const Lane& lane, const Verdict& verdict, const Shared&)
      : p_(p), lane_(lane), decided_(verdict) {}

  __device__ __forceinline__ bool active() const { return lane_.vector < p_.vectors; }
  __device__ __forceinline__ void prefetch_early(uint32_t) {}
  __device__ __forceinline__ void prepare() {}
  __device__ __forceinline__ void prefetch(Rows) {}
  __device__ __forceinline__ void finish(Rows rows, uint32_t, protocol::Vector (&s)[kRows]) {
    if (!active()) return;
    const bool poisoned = decided_.is_poisoned();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows.count) continue;
      if (poisoned) s[i] = poison_vector<D>();
      ptx::store(static_cast<uint8_t*>(p_.out) + vector_offset(p_, rows.first + i, lane_.vector), s[i]);
    }
  }

 private:
  const Params& p_;
  const Lane& lane_;
  VerdictWait decided_;
};

template <class D, int kRows>
class RmsNorm {
 public:
  static constexpr protocol::Op kOp = protocol::Op::all_reduce_rms_norm;
  using Shared = RowSum<kRows>;

  __device__ __forceinline__ RmsNorm(const Params& p, const Lane& lane, const Verdict& verdict, const Shared& shared)
      : p_(p),
        lane_(lane),
        decided_(verdict),
        sums_(ptx::keep(ptx::shared_address(&shared))),
        reciprocal_root_(static_cast<float>(p.vectors * D::kPerVector)) {}

  __device__ __forceinline__ bool active() const { return lane_.vector < p_.vectors; }

  // A layer's weight was last read a whole model ago. Into L2, not into registers: the kernel ahead may be the one that writes it.
  __device__ __forceinline__ void prefetch_early(uint32_t first_row) const {
    if (!active()) return;
    const uint32_t weight_bytes = p_.weight_is_fp32 ? D::kPerVector * 4 : protocol::kVectorBytes;
    ptx::prefetch_to_l2(static_cast<const uint8_t*>(p_.weight) + lane_.vector * weight_bytes);
    ptx::prefetch_to_l2(static_cast<const uint8_t*>(p_.residual) + vector_offset(p_, first_row, lane_.vector));
  }

  // Into registers: the mbarriers in finish() empty L1, and a load behind them would stand alone on the way to the outputs. Four
  // rows at once leave no registers for that over the wait for peers, and load it for all four while they are summed.
  __device__ __forceinline__ void prepare() {
    if (kKeepsWeight && active()) weight_ = load_weight();
  }

  __device__ __forceinline__ void prefetch(Rows rows) {
    if (!active()) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i < rows.count) {
        residual_[i] =
            ptx::load(static_cast<const uint8_t*>(p_.residual) + vector_offset(p_, rows.first + i, lane_.vector));
      }
    }
  }

  __device__ __forceinline__ void finish(Rows rows, uint32_t round, protocol::Vector (&s)[kRows]) {
    float square_sum[kRows] = {};
    if (active()) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i >= rows.count) continue;
        s[i] = protocol::add_residual<D>(s[i], residual_[i]);
        square_sum[i] = protocol::square_sum<D>(s[i]);
      }
    }
    if (!kKeepsWeight && active()) weight_ = load_weight();
    Shared::gather(lane_, sums_, round, square_sum);
    decided_.look();
    Shared::add_up(lane_, sums_, round, square_sum);
    if (active()) {
      float factor[D::kPerVector];
      factors(factor);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i >= rows.count) continue;
        const float rstd = reciprocal_root_(square_sum[i], p_.eps);
        const protocol::Vector norm = protocol::normalize<D>(s[i], rstd, factor, p_.weight_bias);
        const bool poisoned = decided_.is_poisoned();
        store(rows.first + i, poisoned ? poison_vector<D>() : s[i], poisoned ? poison_vector<D>() : norm);
      }
    }
    Shared::prepare_next(lane_, sums_, round);
  }

 private:
  static constexpr bool kKeepsWeight = kRows < 4;
  struct Weight {
    protocol::Vector low, high;  // high: the second four of eight fp32 factors
  };

  __device__ __forceinline__ Weight load_weight() const {
    const auto* base = static_cast<const uint8_t*>(p_.weight);
    if (D::kPerVector == 4 || !p_.weight_is_fp32) return {ptx::load_constant(base + lane_.vector * 16), {}};
    return {ptx::load_constant(base + lane_.vector * 32), ptx::load_constant(base + lane_.vector * 32 + 16)};
  }

  __device__ __forceinline__ void factors(float (&factor)[D::kPerVector]) {
    // Or else the compiler computes them, and waits for the weight, before the first look for peers' data.
    ptx::not_before(weight_.low);
    ptx::not_before(weight_.high);
#pragma unroll
    for (int i = 0; i < D::kPerVector; ++i) {
      const uint32_t word = i < 4 ? weight_.low.word[i % 4] : weight_.high.word[i % 4];
      factor[i] = D::kPerVector == 4 || p_.weight_is_fp32 ? protocol::as_float(word) : D::load(weight_.low, i);
    }
  }

  __device__ __forceinline__ void store(uint32_t row, const protocol::Vector& z, const protocol::Vector& norm) const {
    const uint32_t offset = vector_offset(p_, row, lane_.vector);
    ptx::store(static_cast<uint8_t*>(p_.residual_out) + offset, z);
    ptx::store(static_cast<uint8_t*>(p_.out) + offset, norm);
  }

  const Params& p_;
  const Lane& lane_;
  VerdictWait decided_;
  const uint32_t sums_;
  const ReciprocalRoot reciprocal_root_;
  Weight weight_;
  protocol::Vector residual_[kRows];
};

}  // namespace mnnvl_ar::cuda
