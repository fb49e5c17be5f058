// What an epilogue is: what a call does with a row once it is summed, and what it stores of it. Written once per vector, for GPU
// (kernels/finish.cuh) and host (host/one_rank.h) alike.
//
// Contract. An epilogue is a struct E with
//   * kOp: what peers compare (list.h); none, if several ops share it.
//   * Arguments: what its op is given beside x, trivially copyable: pointers and numbers. It owns its outputs: how many there are,
//     of what type and size, is known here, to the op that allocates or checks them, and to nobody else.
//   * from(bytes), of Arguments: the same for a later piece of the call, `bytes` of x's rows further on.
//   * kNormed. False: E is given the sum s. True: Arguments is a NormArguments; residual_out is stored for it, and E is given norm
//     as stored in the dtype of x (numerics steps 2 to 5). numbers() and variant() of Arguments are signed then: all that ranks have to
//     agree on besides the tensors (protocol/signature.h).
//   * kTakesFp32: whether rows may be fp32. If not, its op refuses them, and nothing of it is built for them.
//   * kMostOver, if kNormed: over which vectors it needs the largest of measure<D>(norm): none, all of the row, or each block of
//     block_vectors(arguments) neighbours, a power of two, of which rows are multiples and a group of 32 is one: so no block is split
//     over warps, whatever the form. An integer maximum, so exact in any order. Magnitudes of floats order like integers, and NaN is
//     above all.
//   * PerCall, and prepare(arguments) that returns one: what all rows need and lies in device memory, such as a scale. It is loaded
//     once, behind the wait for the predecessor, which may have written it, and before the wait for peers.
//   * store<D>(arguments, per_call, tensors, place, v), if kNormed with one more argument, `most`, that maximum, or 0: stores all that
//     depends on vector v = s or norm at `place`.
//   * pad(arguments, tensors, worker, workers), if outputs have padding: stores it, by so many threads, which need not wait for anything.
//   * Tensors of x's size are given from the first row of this launch on, and `place.offset` is into them. All others are given as
//     a whole, and a row's number in the call is tensors.first_token + place.row: a call may run as several launches.
//   * A NaN never becomes a number: given NaN, store() leaves NaN in every output (for codes without NaN, in their scale). That is the
//     poison of a failed call; there is no other.
#pragma once

#include <cstring>

#if defined(__CUDACC__)
#include "kernels/ptx.cuh"
#endif
#include "protocol/numerics.h"
#include "protocol/params.h"
#include "protocol/signature.h"

namespace mnnvl_ar::epilogues {

using protocol::Tensors;
using protocol::Vector;

// A vector of a row of this launch.
struct Place {
  uint32_t row;
  uint32_t vector;
  uint32_t offset;  // in bytes, in a tensor of x's size
};

// The vectors over which a maximum is taken.
enum class MostOver : uint32_t { nothing, row, block };

struct NormArguments {
  const void* residual;  // like x
  const void* weight;    // [hidden], in the dtype of x or fp32
  void* residual_out;    // like x
  float eps;
  float weight_bias;
  uint32_t weight_is_fp32;

  protocol::Numbers numbers() const { return {protocol::as_bits(eps), protocol::as_bits(weight_bias)}; }
  uint32_t variant() const { return weight_is_fp32 ? protocol::kWeightIsFp32 : 0; }

  NormArguments from(uint64_t bytes) const {
    NormArguments a = *this;
    a.residual = static_cast<const uint8_t*>(residual) + bytes;
    a.residual_out = static_cast<uint8_t*>(residual_out) + bytes;
    return a;
  }
};

// The PerCall of an epilogue that needs none.
struct Nothing {};

template <class Arguments>
struct Given {
  Arguments arguments;
};

// All that a launch of one epilogue is given.
template <class Epilogue>
struct CallOf : Given<typename Epilogue::Arguments>, protocol::Params {};

// ---- for store()

MNNVL_AR_HD void store16(void* address, const Vector& v) {
#if defined(__CUDA_ARCH__)
  ptx::store(address, v);
#else
  std::memcpy(address, &v, sizeof(v));
#endif
}

template <class Word>
MNNVL_AR_HD void store_word(void* address, Word word) {
#if defined(__CUDA_ARCH__)
  *static_cast<Word*>(address) = word;
#else
  std::memcpy(address, &word, sizeof(word));
#endif
}

// For prepare(): not .nc, since the predecessor may have written it.
template <class Word>
MNNVL_AR_HD Word load_word(const void* address) {
#if defined(__CUDA_ARCH__)
  return *static_cast<const Word*>(address);
#else
  Word word;
  std::memcpy(&word, address, sizeof(word));
  return word;
#endif
}

MNNVL_AR_HD uint8_t* at(void* tensor, uint64_t bytes) { return static_cast<uint8_t*>(tensor) + bytes; }

// ---- for transports

template <class E>
MNNVL_AR_HD void pad(const typename E::Arguments& a, const Tensors& tensors, uint32_t worker, uint32_t workers) {
  if constexpr (requires { E::pad(a, tensors, worker, workers); }) E::pad(a, tensors, worker, workers);
}

template <class D>
MNNVL_AR_HD Vector poison_vector() {
  float nan[D::kPerVector];
  MNNVL_AR_UNROLL
  for (int i = 0; i < D::kPerVector; ++i) nan[i] = protocol::as_float(protocol::kPoison);
  return protocol::pack<D>(nan);
}

// Of a NaN, as measure() sees it.
inline constexpr uint32_t kPoisonedMost = protocol::kPoison;

// Every output at `place`, of a call that failed.
template <class E, class D>
MNNVL_AR_HD void store_poison(const typename E::Arguments& a, const Tensors& tensors, Place place) {
  const typename E::PerCall per_call = E::prepare(a);
  if constexpr (E::kNormed) {
    store16(at(a.residual_out, place.offset), poison_vector<D>());
    E::template store<D>(a, per_call, tensors, place, poison_vector<D>(),
                         E::kMostOver == MostOver::nothing ? 0 : kPoisonedMost);
  } else {
    E::template store<D>(a, per_call, tensors, place, poison_vector<D>());
  }
}

}  // namespace mnnvl_ar::epilogues
