#include "host/one_rank.h"

#include <cmath>
#include <vector>

#include "host/fault.h"
#include "protocol/numerics.h"

namespace mnnvl_ar::host {
namespace {

using namespace protocol;

bool arrived(const Params& p, const Vector& v) {
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

Vector for_the_wire(const Params& p, const Vector& v) { return is_off(p, Rule::sanitize) ? v : sanitize(v); }

Vector load_plain(const void* base, uint64_t index) { return static_cast<const Vector*>(base)[index]; }

template <class D>
Vector poison_vector() {
  float nan[D::kPerVector];
  for (float& value : nan) value = as_float(kPoison);
  return pack<D>(nan);
}

// One call of one rank, of one dtype.
template <class D>
class Call {
 public:
  Call(const Params& p, Op op, Strategy strategy)
      : p_(p),
        op_(op),
        strategy_(strategy),
        shape_{p.ranks, p.tokens, p.vectors, false},
        state_(reinterpret_cast<State*>(p.block + kStateOffset)),
        epoch_(state_->epoch) {}

  bool run() {
    ok_ = load_word(broken_word(p_.block)) == 0 || is_off(p_, Rule::told);
    if (!ok_) report_fault(p_, FaultCode::peer_fault, {epoch_, kMaxRanks, 0, 0, now_ns()});
    uint32_t slot = slot_of(epoch_), stale = slot_to_clear(epoch_), dirty = state_->dirty;
#ifdef MNNVL_AR_TEST_BUILD
    if (is_off(p_, Rule::three_slots)) slot = epoch_ % 2, stale = 1 - slot;
    if (is_off(p_, Rule::device_epoch)) {
      slot = slot_of(p_.sabotage.frozen_epoch), stale = slot_to_clear(p_.sabotage.frozen_epoch);
    }
    if (is_off(p_, Rule::device_dirty)) dirty = p_.sabotage.frozen_dirty;
    if (is_off(p_, Rule::clear)) dirty = 0;
#endif
    slot_ = slot_offset(slot, p_.slot_bytes);
    if (ok_) {
      send_signature();
      strategy_ == Strategy::one_shot ? send_rows() : scatter();
      clear(p_.block + slot_offset(stale, p_.slot_bytes), dirty);
      *state_ =
          State{next_epoch(epoch_), state_->launched + 1,
                uint32_t(strategy_ == Strategy::one_shot ? one_shot_vectors(shape_) : two_shot_vectors(shape_)), 0};
      check_signatures();
      if (strategy_ == Strategy::two_shot) reduce();
    }
    for (uint32_t row = 0; row < p_.tokens; ++row) finish(row);
    reinterpret_cast<Progress*>(p_.block + kProgressOffset)->finished += 1;
    return ok_;
  }

 private:
  uint8_t* block_of(uint32_t rank) const { return p_.peers[(rank + p_.ranks - p_.rank - 1) % p_.ranks]; }
  uint64_t place(uint64_t position) const { return slot_ + position * kVectorBytes; }

  void send_to_all(uint64_t position, const Vector& v) const {
    const Vector sent = for_the_wire(p_, v);
    for (uint32_t i = 0; i < p_.ranks; ++i) store_vector(p_.peers[i] + place(position), sent);
  }

  void send_signature() const {
    const Vector mine = signature(epoch_, p_.tokens, p_.description);
    for (uint32_t i = 0; i < p_.ranks; ++i) store_vector(p_.peers[i] + board_offset(slot_of(epoch_), p_.rank), mine);
  }

  Vector input(uint32_t row, uint32_t v) const {
    return for_the_wire(p_, load_plain(p_.x, uint64_t{row} * p_.vectors + v));
  }

  void send_rows() const {
    for (uint32_t row = 0; row < p_.tokens; ++row) {
      for (uint32_t v = 0; v < p_.vectors; ++v) {
        for (uint32_t rank = 0; rank < p_.ranks; ++rank) {
          if (rank == p_.rank) continue;
          const uint32_t source = source_of(shape_, p_.rank, rank);
          store_vector(block_of(rank) + place(one_shot_position(shape_, source, row, v)), input(row, v));
        }
      }
    }
  }

  void scatter() const {
    const uint32_t width = owned_columns(shape_);
    for (uint32_t row = 0; row < p_.tokens; ++row) {
      for (uint32_t v = 0; v < p_.vectors; ++v) {
        store_vector(block_of(v / width) + place(scatter_position(shape_, p_.rank, row, v % width)), input(row, v));
      }
    }
  }

  static void clear(uint8_t* slot, uint32_t dirty) {
    for (uint32_t i = 0; i < dirty; ++i) store_vector(slot + uint64_t{i} * kVectorBytes, sentinel_vector());
  }

  // Own columns of every row: sum, and send on.
  void reduce() {
    const uint32_t first = p_.rank * owned_columns(shape_), columns = columns_of(shape_, p_.rank);
    for (uint32_t row = 0; row < p_.tokens; ++row) {
      for (uint32_t column = 0; column < columns; ++column) {
        const Vector s = sum([&](uint32_t source) { return receive(scatter_position(shape_, source, row, column)); });
        send_to_all(gather_position(shape_, row, first + column), s);
      }
    }
  }

  // What is `from` each rank, added in rank order.
  template <class From>
  Vector sum(From from) {
    float total[D::kPerVector] = {};
    for (uint32_t source = 0; source < p_.ranks; ++source) {
      const Vector x = from(source);
      accumulate<D>(total, x);
    }
    return ok_ ? pack<D>(total) : poison_vector<D>();
  }

  Vector receive(uint64_t position) {
    const uint8_t* address = p_.block + place(position);
    Patience patience(p_, epoch_);
    while (ok_) {
      const Vector v = load_vector(address);
      if (arrived(p_, v)) return v;
      ok_ = patience.once_more();
    }
    return poison_vector<D>();
  }

  void check_signatures() {
    if (is_off(p_, Rule::signature)) return;
    for (uint32_t source = 0; source < p_.ranks && ok_; ++source) {
      const uint8_t* address = p_.block + board_offset(slot_of(epoch_), source);
      Patience patience(p_, epoch_);
      while (ok_) {
        const Vector seen = load_vector(address);
        if (is_signature_of(seen, epoch_)) {
          if (agrees(seen, p_.tokens, p_.description)) break;
          report_fault(p_, FaultCode::call_mismatch, {epoch_, source, seen.word[1], seen.word[3], now_ns()});
          ok_ = false;
        } else {
          ok_ = patience.once_more();
        }
      }
    }
  }

  Vector summed(uint32_t row, uint32_t v) {
    if (strategy_ == Strategy::two_shot) return receive(gather_position(shape_, row, v));
    return sum([&](uint32_t rank) {
      if (rank == p_.rank) return input(row, v);
      return receive(one_shot_position(shape_, source_of(shape_, rank, p_.rank), row, v));
    });
  }

  void finish(uint32_t row) {
    auto* out = static_cast<Vector*>(p_.out) + uint64_t{row} * p_.vectors;
    if (op_ == Op::all_reduce) {
      for (uint32_t v = 0; v < p_.vectors; ++v) out[v] = summed(row, v);
      return;
    }
    row_.resize(p_.vectors);
    float sum[kSums] = {};
    for (uint32_t first = 0; first < p_.vectors; first += kGroup) {
      float lane[kGroup] = {};
      for (uint32_t i = 0; i < kGroup && first + i < p_.vectors; ++i) {
        const Vector residual = load_plain(p_.residual, uint64_t{row} * p_.vectors + first + i);
        row_[first + i] = add_residual<D>(summed(row, first + i), residual);
        lane[i] = square_sum<D>(row_[first + i]);
      }
      const uint32_t group = first / kGroup;
      sum[group % kSums] = sum[group % kSums] + reduce_group(lane);
    }
    const float rstd = reciprocal_root(total(sum), static_cast<float>(p_.vectors * D::kPerVector), p_.eps);
    auto* residual_out = static_cast<Vector*>(p_.residual_out) + uint64_t{row} * p_.vectors;
    for (uint32_t v = 0; v < p_.vectors; ++v) {
      residual_out[v] = ok_ ? row_[v] : poison_vector<D>();
      out[v] = ok_ ? normalize<D>(row_[v], rstd, weight_at(v), p_.weight_bias) : poison_vector<D>();
    }
  }

  struct Weight {
    float value[D::kPerVector];
  };
  const float (&weight_at(uint32_t v))[D::kPerVector] {
    for (int i = 0; i < D::kPerVector; ++i) {
      weight_.value[i] = p_.weight_is_fp32 ? static_cast<const float*>(p_.weight)[v * D::kPerVector + i]
                                           : D::load(load_plain(p_.weight, v), i);
    }
    return weight_.value;
  }

  const Params& p_;
  const Op op_;
  const Strategy strategy_;
  const Shape shape_;
  State* const state_;
  const uint32_t epoch_;
  uint64_t slot_ = 0;
  bool ok_ = true;
  Weight weight_{};
  std::vector<Vector> row_;
};

}  // namespace

bool run(const Params& p, Op op, Dtype dtype, Strategy strategy) {
  switch (dtype) {
    case Dtype::bfloat16: return Call<Bfloat16>(p, op, strategy).run();
    case Dtype::float16: return Call<Float16>(p, op, strategy).run();
    case Dtype::float32: return Call<Float32>(p, op, strategy).run();
  }
  return false;
}

}  // namespace mnnvl_ar::host
