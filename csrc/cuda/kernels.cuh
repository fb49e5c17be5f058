// Instantiates every kernel of one dtype.
#pragma once

#include "cuda/kernels.h"
#include "cuda/one_shot.cuh"
#include "cuda/two_shot.cuh"

namespace mnnvl_ar::cuda {

template <class D, int kRanks, template <class, int> class Epilogue>
const void* kernel_of(protocol::Strategy strategy, unsigned rows) {
  if (strategy == protocol::Strategy::one_shot) return reinterpret_cast<const void*>(&one_shot<D, kRanks, Epilogue>);
  switch (rows) {
    case 1: return reinterpret_cast<const void*>(&two_shot<D, kRanks, 1, Epilogue>);
    case 2: return reinterpret_cast<const void*>(&two_shot<D, kRanks, 2, Epilogue>);
    default: return reinterpret_cast<const void*>(&two_shot<D, kRanks, 4, Epilogue>);
  }
}

template <class D, int kRanks>
const void* kernel_of(protocol::Strategy strategy, protocol::Op op, unsigned rows) {
  switch (op) {
    case protocol::Op::all_reduce: return kernel_of<D, kRanks, Plain>(strategy, rows);
    case protocol::Op::all_reduce_rms_norm: return kernel_of<D, kRanks, RmsNorm>(strategy, rows);
  }
  return nullptr;
}

template <class D>
const void* kernel_of(protocol::Strategy strategy, protocol::Op op, unsigned ranks, unsigned rows) {
  switch (ranks) {
    case 2: return kernel_of<D, 2>(strategy, op, rows);
    case 4: return kernel_of<D, 4>(strategy, op, rows);
    case 8: return kernel_of<D, 8>(strategy, op, rows);
    default: return kernel_of<D, 0>(strategy, op, rows);
  }
}

}  // namespace mnnvl_ar::cuda
