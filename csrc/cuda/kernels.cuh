// Instantiates every kernel of one dtype.
#pragma once

#include "cuda/kernels.h"
#include "cuda/one_shot.cuh"
#include "cuda/two_shot.cuh"

namespace mnnvl_ar::cuda {

template <class D, int kRanks>
const void* kernel_of(protocol::Strategy strategy, protocol::Op op) {
  const bool two = strategy == protocol::Strategy::two_shot;
  switch (op) {
    case protocol::Op::all_reduce:
      return two ? reinterpret_cast<const void*>(&two_shot<D, kRanks, Plain>)
                 : reinterpret_cast<const void*>(&one_shot<D, kRanks, Plain>);
    case protocol::Op::all_reduce_rms_norm:
      return two ? reinterpret_cast<const void*>(&two_shot<D, kRanks, RmsNorm>)
                 : reinterpret_cast<const void*>(&one_shot<D, kRanks, RmsNorm>);
  }
  return nullptr;
}

template <class D>
const void* kernel_of(protocol::Strategy strategy, protocol::Op op, unsigned ranks) {
  switch (ranks) {
    case 2: return kernel_of<D, 2>(strategy, op);
    case 4: return kernel_of<D, 4>(strategy, op);
    case 8: return kernel_of<D, 8>(strategy, op);
    default: return kernel_of<D, 0>(strategy, op);
  }
}

}  // namespace mnnvl_ar::cuda
