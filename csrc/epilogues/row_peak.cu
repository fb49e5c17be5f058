#ifdef MNNVL_AR_TEST_BUILD
#include "epilogues/row_peak.h"

#include "kernels/build.cuh"

const void* mnnvl_ar::epilogues::row_peak_kernel(protocol::Dtype dtype, uint32_t ranks, launch::Form form) {
  return kernels::kernel_of<RowPeak>(dtype, ranks, form);
}
#endif
