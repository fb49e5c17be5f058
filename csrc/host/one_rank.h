// The host transport: the same calls over the same ring, by one thread a rank, in memory that processes share.
//
// Contract
//   * run() is the whole call of one rank, or one piece of it. It returns when this rank's outputs are stored.
//   * Data moves as 64-bit atomics, released when stored and acquired when loaded; sentinel, layout, order and rounding are
//     those of csrc/protocol, and the epilogue is the device's, so the bits are the device's, in whatever floating-point mode the
//     caller is.
//   * False: a fault. The record holds it, the block and every peer's are marked broken, outputs are NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "epilogues/epilogue.h"
#include "host/fault.h"
#include "host/float_mode.h"
#include "protocol/numerics.h"
#include "protocol/pieces.h"
#include "protocol/signature.h"

namespace mnnvl_ar::host {
namespace detail {

using namespace protocol;
using epilogues::MostOver;

inline bool arrived(const Params& p, const Vector& v) {
  if (is_off(p, Rule::every_word)) return v.word[0] != kSentinel;
  if (is_off(p, Rule::integer_compare)) {  // flushes subnormals, as the peers' kernel did
    for (uint32_t word : v.word) {
      const bool flushed = (word & 0x7f800000u) == 0;
      if (flushed && word >> 31) return false;
    }
    return true;
  }
  return has_arrived(v);
}

inline Vector for_the_wire(const Params& p, const Vector& v) { return is_off(p, Rule::sanitize) ? v : sanitize(v); }

inline Vector load_plain(const void* base, uint64_t index) { return static_cast<const Vector*>(base)[index]; }

// One call of one rank, of one epilogue and dtype.
template <class E, class D>
class Call {
 public:
  explicit Call(const epilogues::CallOf<E>& p)
      : p_(p),
        strategy_(strategy_of(p.tensors.description)),
        shape_{p.group.ranks, p.tensors.tokens, p.tensors.vectors, p.group.multicast != nullptr},
        state_(reinterpret_cast<State*>(p.group.block + kStateOffset)),
        epoch_(state_->epoch),
        per_call_(E::prepare(p.arguments)) {}

  bool run() {
    const uint32_t broken = load_word(broken_word(p_.group.block));
    ok_ = broken == 0 || is_off(p_, Rule::peer_mark);
    if (!ok_) report_fault(p_, code_of_own(broken), {epoch_, kMaxRanks, 0, 0, now_ns()});
    uint32_t slot = slot_of(epoch_), stale = slot_to_clear(epoch_), dirty = state_->dirty;
#ifdef MNNVL_AR_TEST_BUILD
    if (is_off(p_, Rule::three_slots)) slot = epoch_ % 2, stale = 1 - slot;
    if (is_off(p_, Rule::device_epoch)) {
      slot = slot_of(p_.sabotage.frozen_epoch), stale = slot_to_clear(p_.sabotage.frozen_epoch);
    }
    if (is_off(p_, Rule::device_dirty)) dirty = p_.sabotage.frozen_dirty;
    if (is_off(p_, Rule::clear)) dirty = 0;
#endif
    slot_ = slot_offset(slot, p_.group.slot_bytes);
    if (ok_) {
      send_signature();
      strategy_ == Strategy::one_shot ? send_rows() : scatter();
      clear(p_.group.block + slot_offset(stale, p_.group.slot_bytes), dirty);
      if (p_.tensors.first_token != 0) {
        uint32_t& later = reinterpret_cast<Progress*>(p_.group.block + kProgressOffset)->later;
        later = next_epoch(later);
      }
      *state_ = State{next_epoch(epoch_), state_->launched + 1, uint32_t(slot_vectors_of(strategy_, shape_)), 0};
      check_signatures();
      if (strategy_ == Strategy::two_shot) reduce();
    }
    for (uint32_t row = 0; row < p_.tensors.tokens; ++row) finish(row);
    if (!is_off(p_, Rule::padding)) epilogues::pad<E>(p_.arguments, p_.tensors, 0, 1);
    reinterpret_cast<Progress*>(p_.group.block + kProgressOffset)->finished += 1;
    return ok_;
  }

 private:
  uint64_t place(uint64_t position) const { return slot_ + position * kVectorBytes; }

  void send_to_all(uint64_t position, const Vector& v) const {
    const Vector sent = for_the_wire(p_, v);
    for (uint32_t i = 0; i < p_.group.ranks; ++i) store_vector(p_.group.peers[i] + place(position), sent);
  }

  void send_signature() const {
    const Vector mine = signature(epoch_, p_.tensors.call_tokens, p_.tensors.description);
    const Vector numbers = signature(epoch_, p_.tensors.numbers.eps, p_.tensors.numbers.weight_bias);
    for (uint32_t i = 0; i < p_.group.ranks; ++i) {
      uint8_t* const place = p_.group.peers[i] + board_offset(slot_of(epoch_), p_.group.rank);
      store_vector(place, mine);
      if (E::kNormed) store_vector(place + kOneBoardBytes, numbers);
    }
  }

  Vector input(uint32_t row, uint32_t v) const {
    return for_the_wire(p_, load_plain(p_.tensors.x, uint64_t{row} * p_.tensors.vectors + v));
  }

  void send_rows() const {
    for (uint32_t row = 0; row < p_.tensors.tokens; ++row) {
      for (uint32_t v = 0; v < p_.tensors.vectors; ++v) {
        for (uint32_t rank = 0; rank < p_.group.ranks; ++rank) {
          if (rank == p_.group.rank && !shape_.own_too) continue;
          const uint32_t source = source_of(shape_, p_.group.rank, rank);
          store_vector(p_.group.block_of(rank) + place(one_shot_position(shape_, source, row, v)), input(row, v));
        }
      }
    }
  }

  void scatter() const {
    const uint32_t width = owned_columns(shape_);
    for (uint32_t row = 0; row < p_.tensors.tokens; ++row) {
      for (uint32_t v = 0; v < p_.tensors.vectors; ++v) {
        store_vector(p_.group.block_of(v / width) + place(scatter_position(shape_, p_.group.rank, row, v % width)),
                     input(row, v));
      }
    }
  }

  static void clear(uint8_t* slot, uint32_t dirty) {
    for (uint32_t i = 0; i < dirty; ++i) store_vector(slot + uint64_t{i} * kVectorBytes, sentinel_vector());
  }

  // Own columns of every row: sum, and send on.
  void reduce() {
    const uint32_t first = p_.group.rank * owned_columns(shape_), columns = columns_of(shape_, p_.group.rank);
    for (uint32_t row = 0; row < p_.tensors.tokens; ++row) {
      for (uint32_t column = 0; column < columns; ++column) {
        const Vector s = sum([&](uint32_t source) { return receive(scatter_position(shape_, source, row, column)); });
        if (!ok_) return;  // no NaN is sent as data
        send_to_all(gather_position(shape_, row, first + column), s);
      }
    }
  }

  // What is `from` each rank, added in rank order.
  template <class From>
  Vector sum(From from) {
    float total[D::kPerVector] = {};
    for (uint32_t source = 0; source < p_.group.ranks; ++source) {
      const Vector x = from(source);
      accumulate<D>(total, x);
    }
    return ok_ ? pack<D>(total) : epilogues::poison_vector<D>();
  }

  Vector receive(uint64_t position) {
    const uint8_t* address = p_.group.block + place(position);
    BoundedWait wait(p_, epoch_);
    while (ok_) {
      const Vector v = load_vector(address);
      if (arrived(p_, v)) return v;
      ok_ = wait.once_more();
    }
    return epilogues::poison_vector<D>();
  }

  void check_signatures() {
    if (is_off(p_, Rule::signature)) return;
    for (uint32_t source = 0; source < p_.group.ranks && ok_; ++source) {
      const uint8_t* address = p_.group.block + board_offset(slot_of(epoch_), source);
      BoundedWait wait(p_, epoch_);
      while (ok_) {
        const Vector call = load_vector(address), numbers = load_vector(address + kOneBoardBytes);
        const Tensors& t = p_.tensors;
        const Signed found = compare<E::kNormed>(epoch_, call, numbers, t.call_tokens, t.description, t.numbers);
        if (found == Signed::alike) break;
        if (found == Signed::differs) {
          report_fault(p_, FaultCode::call_mismatch,
                       {epoch_, source, call.word[1], call.word[3], now_ns(),
                        numbers_of<E::kNormed>(numbers, epoch_, t.numbers)});
          ok_ = false;
        } else {
          ok_ = wait.once_more();
        }
      }
    }
  }

  Vector summed(uint32_t row, uint32_t v) {
    if (strategy_ == Strategy::two_shot) return receive(gather_position(shape_, row, v));
    return sum([&](uint32_t rank) {
      if (rank == p_.group.rank && !shape_.own_too) return input(row, v);
      return receive(one_shot_position(shape_, source_of(shape_, rank, p_.group.rank), row, v));
    });
  }

  epilogues::Place place_of(uint32_t row, uint32_t v) const {
    return {row, v, (row * p_.tensors.vectors + v) * kVectorBytes};
  }

  void finish(uint32_t row) {
    if constexpr (E::kNormed) {
      norm(row);
    } else {
      for (uint32_t v = 0; v < p_.tensors.vectors; ++v) {
        E::template store<D>(p_.arguments, per_call_, p_.tensors, place_of(row, v), summed(row, v));
      }
    }
    if (ok_) return;
    for (uint32_t v = 0; v < p_.tensors.vectors; ++v) {
      epilogues::store_poison<E, D>(p_.arguments, p_.tensors, place_of(row, v));
    }
  }

  void norm(uint32_t row) {
    const uint32_t vectors = p_.tensors.vectors;
    row_.resize(vectors);
    float part[kSums] = {};
    for (uint32_t first = 0; first < vectors; first += kGroup) {
      float lane[kGroup] = {};
      for (uint32_t i = 0; i < kGroup && first + i < vectors; ++i) {
        const Vector residual = load_plain(p_.arguments.residual, uint64_t{row} * vectors + first + i);
        row_[first + i] = add_residual<D>(summed(row, first + i), residual);
        lane[i] = square_sum<D>(row_[first + i]);
      }
      const uint32_t group = first / kGroup;
      part[group % kSums] = part[group % kSums] + reduce_group(lane);
    }
    if (!ok_) return;
    const float rstd = reciprocal_root(total(part), static_cast<float>(vectors * D::kPerVector), p_.arguments.eps);
    for (uint32_t first = 0, next; first < vectors; first = next) {
      next = first + sharing_a_most();
      uint32_t most = 0;
      for (uint32_t v = first; v < next; ++v) {
        epilogues::store16(epilogues::at(p_.arguments.residual_out, place_of(row, v).offset), row_[v]);
        row_[v] = normalize<D>(row_[v], rstd, weight_at(v), p_.arguments.weight_bias);
        if constexpr (E::kMostOver != MostOver::nothing) most = std::max(most, E::template measure<D>(row_[v]));
      }
      for (uint32_t v = first; v < next; ++v) {
        E::template store<D>(p_.arguments, per_call_, p_.tensors, place_of(row, v), row_[v], most);
      }
    }
  }

  // Neighbouring vectors, of which the row is a multiple.
  uint32_t sharing_a_most() const {
    if constexpr (E::kMostOver == MostOver::block) return E::block_vectors(p_.arguments);
    return E::kMostOver == MostOver::row ? p_.tensors.vectors : 1;
  }

  struct Weight {
    float value[D::kPerVector];
  };
  const float (&weight_at(uint32_t v))[D::kPerVector] {
    for (int i = 0; i < D::kPerVector; ++i) {
      weight_.value[i] = p_.arguments.weight_is_fp32
                             ? static_cast<const float*>(p_.arguments.weight)[v * D::kPerVector + i]
                             : D::load(load_plain(p_.arguments.weight, v), i);
    }
    return weight_.value;
  }

  const epilogues::CallOf<E>& p_;
  const Strategy strategy_;
  const Shape shape_;
  State* const state_;
  const uint32_t epoch_;
  const typename E::PerCall per_call_;
  uint64_t slot_ = 0;
  bool ok_ = true;
  Weight weight_{};
  std::vector<Vector> row_;
};

template <class E>
[[gnu::noinline]] bool run(const epilogues::CallOf<E>& call, Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16: return Call<E, Bfloat16>(call).run();
    case Dtype::float16: return Call<E, Float16>(call).run();
    case Dtype::float32:
      if constexpr (E::kTakesFp32) return Call<E, Float32>(call).run();
      break;
  }
  return false;
}

}  // namespace detail

template <class E>
bool run(const epilogues::CallOf<E>& call, protocol::Dtype dtype) {
  const FloatMode mode(!protocol::is_off(call, protocol::Rule::float_mode));
  return detail::run<E>(call, dtype);
}

}  // namespace mnnvl_ar::host
