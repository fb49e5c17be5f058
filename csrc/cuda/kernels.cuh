// Instantiates every kernel of one dtype.
#pragma once

#include "cuda/kernels.h"
#include "cuda/one_shot.cuh"
#include "cuda/two_shot.cuh"

namespace mnnvl_ar::cuda {

template <class D, int kRanks, template <class, class> class Epilogue>
const void* kernel_of(protocol::Strategy strategy, unsigned at_once) {
  if (strategy == protocol::Strategy::one_shot) {
    if (at_once == 0) return reinterpret_cast<const void*>(&one_shot<D, kRanks, Tile<1>, Epilogue>);
    if constexpr (kRanks == 2) {
      if (at_once == 2) return reinterpret_cast<const void*>(&one_shot<D, kRanks, Tile<1, 2, true>, Epilogue>);
      if (at_once == 3) return reinterpret_cast<const void*>(&one_shot<D, kRanks, Tile<1, 2>, Epilogue>);
    }
    return reinterpret_cast<const void*>(&one_shot<D, kRanks, Tile<1, 1, true>, Epilogue>);
  }
  switch (at_once) {
    case 1: return reinterpret_cast<const void*>(&two_shot<D, kRanks, 1, Epilogue>);
    case 2: return reinterpret_cast<const void*>(&two_shot<D, kRanks, 2, Epilogue>);
    default: return reinterpret_cast<const void*>(&two_shot<D, kRanks, 4, Epilogue>);
  }
}

template <class D, int kRanks>
const void* kernel_of(protocol::Strategy strategy, protocol::Op op, unsigned at_once) {
  switch (op) {
    case protocol::Op::all_reduce: return kernel_of<D, kRanks, Plain>(strategy, at_once);
    case protocol::Op::all_reduce_rms_norm: return kernel_of<D, kRanks, RmsNorm>(strategy, at_once);
  }
  return nullptr;
}

template <class D>
const void* kernel_of(protocol::Strategy strategy, protocol::Op op, unsigned ranks, unsigned at_once) {
  switch (ranks) {
    case 2: return kernel_of<D, 2>(strategy, op, at_once);
    case 4: return kernel_of<D, 4>(strategy, op, at_once);
    case 8: return kernel_of<D, 8>(strategy, op, at_once);
    default: return kernel_of<D, 0>(strategy, op, at_once);
  }
}

}  // namespace mnnvl_ar::cuda
