// What is fused after the sum. An epilogue sees s of one vector of one row at a time, and stores the outputs.
//
// An epilogue has
//   * kOp, what peers are told;
//   * init(): by all threads, before the cluster is synchronised;
//   * prepare(): loads that do not depend on the row; prefetch(row): loads that do, issued before the wait for peers;
//   * finish(row, round, s): called by every thread with rows, `active` or not, since it may hold barriers. After a fault s is
//     NaN, and so is all that is stored.
// A quantised output is a function of `norm` as stored: a new epilogue derives from RmsNorm and replaces its store.
#pragma once

#include "cuda/call.cuh"
#include "cuda/row.cuh"

namespace mnnvl_ar::cuda {

__device__ __forceinline__ uint64_t vector_offset(const Params& p, uint32_t row, uint32_t vector) {
  return (uint64_t{row} * p.vectors + vector) * protocol::kVectorBytes;
}

template <class D>
__device__ __forceinline__ protocol::Vector poison_vector() {
  float nan[D::kPerVector];
#pragma unroll
  for (float& value : nan) value = protocol::as_float(protocol::kPoison);
  return protocol::pack<D>(nan);
}

template <class D>
struct Plain {
  static constexpr protocol::Op kOp = protocol::Op::all_reduce;
  struct Shared {
    __device__ __forceinline__ void init() {}
  };

  const Params& p;
  const Lane& lane;
  const Verdict& verdict;
  Shared& shared;

  __device__ __forceinline__ bool active() const { return lane.vector < p.vectors; }
  __device__ __forceinline__ void prepare() {}
  __device__ __forceinline__ void prefetch(uint32_t) {}
  __device__ __forceinline__ void finish(uint32_t row, uint32_t, protocol::Vector s) {
    if (!active()) return;
    if (is_poisoned(verdict)) s = poison_vector<D>();
    ptx::store(static_cast<uint8_t*>(p.out) + vector_offset(p, row, lane.vector), s);
  }
};

template <class D>
struct RmsNorm {
  static constexpr protocol::Op kOp = protocol::Op::all_reduce_rms_norm;
  using Shared = RowSum;

  const Params& p;
  const Lane& lane;
  const Verdict& verdict;
  Shared& shared;
  float weight[D::kPerVector];
  protocol::Vector residual;

  __device__ __forceinline__ bool active() const { return lane.vector < p.vectors; }

  __device__ __forceinline__ void prepare() {
    if (!active()) return;
    const auto* base = static_cast<const uint8_t*>(p.weight);
    if (D::kPerVector == 8 && !p.weight_is_fp32) {
      const protocol::Vector w = ptx::load_constant(base + lane.vector * protocol::kVectorBytes);
#pragma unroll
      for (int i = 0; i < D::kPerVector; ++i) weight[i] = D::load(w, i);
    } else {
#pragma unroll
      for (int i = 0; i < D::kPerVector; i += 4) {
        const protocol::Vector w = ptx::load_constant(base + (lane.vector * D::kPerVector + i) * 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) weight[i + j] = protocol::as_float(w.word[j]);
      }
    }
  }

  __device__ __forceinline__ void prefetch(uint32_t row) {
    if (active()) residual = ptx::load(static_cast<const uint8_t*>(p.residual) + vector_offset(p, row, lane.vector));
  }

  __device__ __forceinline__ void finish(uint32_t row, uint32_t round, const protocol::Vector& s) {
    protocol::Vector z{};
    float square_sum = 0.0f;
    if (active()) {
      z = protocol::add_residual<D>(s, residual);
      square_sum = protocol::square_sum<D>(z);
    }
    const float total = shared(lane, round, square_sum);
    const bool poisoned = is_poisoned(verdict);
    if (!active()) return;
    const float hidden = static_cast<float>(p.vectors * D::kPerVector);
    const float rstd = protocol::reciprocal_root(total, hidden, p.eps);
    protocol::Vector norm = protocol::normalize<D>(z, rstd, weight, p.weight_bias);
    if (poisoned) norm = z = poison_vector<D>();
    const uint64_t offset = vector_offset(p, row, lane.vector);
    ptx::store(static_cast<uint8_t*>(p.residual_out) + offset, z);
    ptx::store(static_cast<uint8_t*>(p.out) + offset, norm);
  }
};

}  // namespace mnnvl_ar::cuda
