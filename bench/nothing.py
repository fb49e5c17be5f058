"""An op with the arguments of `all_reduce_rms_norm_out` that does nothing, registered as ours are: what PyTorch takes
to call such an op at all, before a line of the library runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

# As in csrc/torch/ops/rms_norm.cpp.
SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

static void nothing(Tensor, Tensor, Tensor, double, Tensor, Tensor, int64_t, double, int64_t, int64_t, int64_t) {}

STABLE_TORCH_LIBRARY_FRAGMENT(mnnvl_ar_bench, m) { m.def("%s"); }
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar_bench, CPU, m) { m.impl("nothing", TORCH_BOX(&nothing)); }
STABLE_TORCH_LIBRARY_IMPL(mnnvl_ar_bench, CUDA, m) { m.impl("nothing", TORCH_BOX(&nothing)); }
"""
FLAGS = ["-O2", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # as in setup.py


def op() -> Callable[..., None]:
    """Compiled at first use, by the C++ compiler that there is; whatever that raises is raised."""
    from torch.utils.cpp_extension import load_inline

    schema = str(torch.ops.mnnvl_ar.all_reduce_rms_norm_out.default._schema)
    source = SOURCE % schema.replace("mnnvl_ar::all_reduce_rms_norm_out", "nothing")
    load_inline("mnnvl_ar_nothing", source, extra_cflags=FLAGS, is_python_module=False, no_implicit_headers=True)
    made: Callable[..., None] = torch.ops.mnnvl_ar_bench.nothing.default
    return made
