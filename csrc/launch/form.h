// The forms of a kernel: how it goes over rows. A kernel is one epilogue, dtype, number of ranks and form.
#pragma once

#include <cstdint>

#include "protocol/signature.h"

namespace mnnvl_ar::launch {

enum class Form : uint32_t {
  row,                // one-shot: a cluster has one row and is done; a thread holds one vector of it (one column)
  row_two_columns,    // the same, two columns a thread
  queue,              // one-shot: a cluster takes one row after the other
  queue_two_columns,  // the same, two columns a thread
  batch_of_1,         // two-shot: a cluster takes one batch of rows after the other, and of each one row at a time
  batch_of_2,         // two rows at a time
  batch_of_4,         // four rows at a time
};

inline constexpr Form kForms[] = {Form::row,        Form::row_two_columns, Form::queue,     Form::queue_two_columns,
                                  Form::batch_of_1, Form::batch_of_2,      Form::batch_of_4};

constexpr protocol::Strategy strategy_of(Form form) {
  return form < Form::batch_of_1 ? protocol::Strategy::one_shot : protocol::Strategy::two_shot;
}

inline constexpr uint32_t kHopper = 9, kBlackwell = 10;  // the major number of a compute capability

// Two columns are worth their registers only where one peer's data is awaited. Four rows at a time spill for eight ranks, and for
// any number on Blackwell.
constexpr bool is_built(Form form, uint32_t ranks, uint32_t generation) {
  switch (form) {
    case Form::row:
    case Form::queue:
    case Form::batch_of_1:
    case Form::batch_of_2: return true;
    case Form::row_two_columns:
    case Form::queue_two_columns: return ranks == 1 || ranks == 2;
    case Form::batch_of_4: return ranks != 8 && generation < kBlackwell;
  }
  return false;
}

}  // namespace mnnvl_ar::launch
