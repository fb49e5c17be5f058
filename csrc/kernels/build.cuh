// Instantiates every kernel of one epilogue, and nothing that launch/form.h does not list as built.
#pragma once

#include "kernels/one_shot.cuh"
#include "kernels/two_shot.cuh"
#include "launch/form.h"

namespace mnnvl_ar::kernels {

template <class E, class D, int kRanks>
const void* kernel_of(launch::Form form) {
  using launch::Form;
  switch (form) {
    case Form::row: return reinterpret_cast<const void*>(&one_shot<D, kRanks, Tile<1, 1, true>, E>);
    case Form::queue: return reinterpret_cast<const void*>(&one_shot<D, kRanks, Tile<1>, E>);
    case Form::batch_of_1: return reinterpret_cast<const void*>(&two_shot<D, kRanks, Tile<1>, E>);
    case Form::batch_of_2: return reinterpret_cast<const void*>(&two_shot<D, kRanks, Tile<2>, E>);
    case Form::row_two_columns:
      if constexpr (launch::is_built(Form::row_two_columns, kRanks, launch::kHopper)) {
        return reinterpret_cast<const void*>(&one_shot<D, kRanks, Tile<1, 2, true>, E>);
      }
      break;
    case Form::queue_two_columns:
      if constexpr (launch::is_built(Form::queue_two_columns, kRanks, launch::kHopper)) {
        return reinterpret_cast<const void*>(&one_shot<D, kRanks, Tile<1, 2>, E>);
      }
      break;
    case Form::batch_of_4:
      if constexpr (launch::is_built(Form::batch_of_4, kRanks, launch::kHopper)) {
        return reinterpret_cast<const void*>(&two_shot<D, kRanks, Tile<4>, E>);
      }
      break;
  }
  return nullptr;
}

template <class E, class D>
const void* kernel_of(uint32_t ranks, launch::Form form) {
  switch (ranks) {
    case 1:  // as of two, one of whom is not there
    case 2: return kernel_of<E, D, 2>(form);
    case 4: return kernel_of<E, D, 4>(form);
    case 8: return kernel_of<E, D, 8>(form);
    default: return kernel_of<E, D, 0>(form);
  }
}

template <class E>
const void* kernel_of(protocol::Dtype dtype, uint32_t ranks, launch::Form form) {
  switch (dtype) {
    case protocol::Dtype::bfloat16: return kernel_of<E, protocol::Bfloat16>(ranks, form);
    case protocol::Dtype::float16: return kernel_of<E, protocol::Float16>(ranks, form);
    case protocol::Dtype::float32: return kernel_of<E, protocol::Float32>(ranks, form);
  }
  return nullptr;
}

}  // namespace mnnvl_ar::kernels
