// The epilogues that are built: op, name, kernels. The only list; what is not here is neither loaded nor named.
//
// A new epilogue: a member of Op for each op that it is of, a line of kEpilogues, and a declaration of its kernels.
#pragma once

#include <cstdint>

#include "launch/form.h"
#include "protocol/signature.h"

namespace mnnvl_ar::protocol {

// In a signature, in four bits.
enum class Op : uint32_t {
  all_reduce = 0,
  all_reduce_rms_norm = 1,
  all_reduce_rms_norm_static_fp8 = 2,
  all_reduce_rms_norm_per_token_fp8 = 3,
  all_reduce_rms_norm_per_token_group_fp8 = 4,
  all_reduce_rms_norm_mxfp8 = 5,
  all_reduce_rms_norm_nvfp4 = 6,
#ifdef MNNVL_AR_TEST_BUILD
  row_peak = 15,
#endif
};

}  // namespace mnnvl_ar::protocol

namespace mnnvl_ar::epilogues {

// A kernel's address, for the CUDA runtime; null if that form is not built for so many ranks, or nothing for that dtype. World sizes
// 2, 4 and 8 have kernels of their own, all others share one. Ops may share an epilogue, and its kernels.
using KernelOf = const void*(protocol::Dtype dtype, uint32_t ranks, launch::Form form);

KernelOf plain_kernel, rms_norm_kernel, static_fp8_kernel, per_token_fp8_kernel, block_scaled_kernel, row_peak_kernel;

struct Listed {
  protocol::Op op;
  const char* name;
  KernelOf* kernel;  // null in a build for the host alone
};

#if MNNVL_AR_CUDA
#define MNNVL_AR_OP(name, kernel) {protocol::Op::name, #name, kernel}
#else
#define MNNVL_AR_OP(name, kernel) {protocol::Op::name, #name, nullptr}
#endif

inline constexpr Listed kEpilogues[] = {
    MNNVL_AR_OP(all_reduce, plain_kernel),
    MNNVL_AR_OP(all_reduce_rms_norm, rms_norm_kernel),
    MNNVL_AR_OP(all_reduce_rms_norm_static_fp8, static_fp8_kernel),
    MNNVL_AR_OP(all_reduce_rms_norm_per_token_fp8, per_token_fp8_kernel),
    MNNVL_AR_OP(all_reduce_rms_norm_per_token_group_fp8, block_scaled_kernel),
    MNNVL_AR_OP(all_reduce_rms_norm_mxfp8, block_scaled_kernel),
    MNNVL_AR_OP(all_reduce_rms_norm_nvfp4, block_scaled_kernel),
#ifdef MNNVL_AR_TEST_BUILD
    MNNVL_AR_OP(row_peak, row_peak_kernel),
#endif
};

#undef MNNVL_AR_OP

// Null for a number that is not in the list.
constexpr const Listed* find(protocol::Op op) {
  for (const Listed& listed : kEpilogues) {
    if (listed.op == op) return &listed;
  }
  return nullptr;
}

}  // namespace mnnvl_ar::epilogues
