// torch.ops.mnnvl_ar.all_reduce and all_reduce_out. Names and docstrings for people: mnnvl_ar/ops.py.
#include <torch/csrc/stable/library.h>

#include "epilogues/plain.h"
#include "torch/run.h"

namespace mnnvl_ar {
namespace {

using epilogues::Plain;

Tensor all_reduce(Tensor x, int64_t workspace, int64_t strategy, int64_t pdl, int64_t tag) {
  const Agreement a = check_elements(x);
  Tensor out = empty_like(x);
  run<Plain>(workspace, a, {strategy, pdl, tag}, {out.data_ptr()});
  return out;
}

void all_reduce_out(Tensor x, Tensor out, int64_t workspace, int64_t strategy, int64_t pdl, int64_t tag) {
  const Agreement a = check_elements(x);
  check_alike(a, out, "out");
  check_apart(span_of_rows(a, out, "out"), span_of_rows(a, x, "x"), Sharing::all_or_nothing);
  run<Plain>(workspace, a, {strategy, pdl, tag}, {out.data_ptr()});
}

template <class Library>
void implement(Library& m) {
  m.impl("all_reduce", TORCH_BOX(&all_reduce));
  m.impl("all_reduce_out", TORCH_BOX(&all_reduce_out));
}

}  // namespace
}  // namespace mnnvl_ar

STABLE_TORCH_LIBRARY_FRAGMENT(mnnvl_ar, m) {
  m.def("all_reduce(Tensor x, int workspace, *, int strategy=-1, int pdl=-1, int tag=0) -> Tensor");
  m.def("all_reduce_out(Tensor x, Tensor(a!) out, int workspace, *, int strategy=-1, int pdl=-1, int tag=0) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CPU, m) { mnnvl_ar::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar, CUDA, m) { mnnvl_ar::implement(m); }
