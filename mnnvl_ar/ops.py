"""The ops, `torch.ops.mnnvl_ar.*`. They live in C++ (csrc/torch/ops.cpp); here are their names, their shapes for the
compiler, and their documentation.

In all of them `x` is this rank's share, [..., hidden], bf16, fp16 or fp32, contiguous and 16-byte aligned, with rows
of a multiple of 16 bytes up to 32 KiB; `workspace` is `Workspace.handle`. All ranks of the group make the same calls,
with the same shapes, in the same order. CUDA tensors run on the current stream and may be captured; CPU tensors run at
once.

`strategy` is a `Strategy`, `pdl` a `Pdl`; -1 leaves the choice to the workspace. Outputs of the `_out` forms may be `x`
or `residual` themselves (not a part of one), but not each other.

Errors: `RuntimeError`, naming argument, got and wanted, before anything is launched. A workspace that broke raises too.
Source: mnnvl_ar design, docs/numerics.md for every bit of the results.
"""

from __future__ import annotations

import sys
from enum import IntEnum

import torch

from mnnvl_ar._library import ops


class Strategy(IntEnum):
    """How ranks share the work: one hop with R - 1 times the bytes on the link, or two with 2 (R - 1) / R times."""

    AUTO = -1
    ONE_SHOT = 0
    TWO_SHOT = 1


class Pdl(IntEnum):
    """Programmatic dependent launch. LATE: this kernel may be launched before its predecessor ends. EARLY: also, the
    next kernel may be launched before this one ends; a next kernel that reads our outputs must then wait for us, as
    kernels without the launch attribute always do."""

    WORKSPACE = -1
    OFF = 0
    LATE = 1
    EARLY = 2


all_reduce = ops.all_reduce.default
"""all_reduce(x, workspace, *, strategy=-1, pdl=-1) -> Tensor: the sum over ranks, like `x`."""

all_reduce_out = ops.all_reduce_out.default
"""all_reduce_out(x, out, workspace, *, strategy=-1, pdl=-1): the same into `out`, like `x`."""

all_reduce_rms_norm = ops.all_reduce_rms_norm.default
"""all_reduce_rms_norm(x, residual, weight, eps, workspace, *, weight_bias=0.0, strategy=-1, pdl=-1) -> (norm,
residual_out): residual_out = sum over ranks + residual, norm = residual_out / rms(residual_out) * (weight_bias +
weight); `residual` like `x`, `weight` [hidden] in the dtype of `x` or fp32. Both outputs like `x`."""

all_reduce_rms_norm_out = ops.all_reduce_rms_norm_out.default
"""all_reduce_rms_norm_out(x, residual, weight, eps, norm_out, residual_out, workspace, *, weight_bias=0.0,
strategy=-1, pdl=-1)
"""

NAMES = ("all_reduce", "all_reduce_out", "all_reduce_rms_norm", "all_reduce_rms_norm_out")


@torch.library.register_fake("mnnvl_ar::all_reduce")
def _(x: torch.Tensor, workspace: int, *, strategy: int = -1, pdl: int = -1) -> torch.Tensor:
    _know_in_inductor()
    return torch.empty_like(x)


@torch.library.register_fake("mnnvl_ar::all_reduce_rms_norm")
def _(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    workspace: int,
    *,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    _know_in_inductor()
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.register_fake("mnnvl_ar::all_reduce_out")
def _(*arguments: object, **choice: object) -> None:
    _know_in_inductor()


@torch.library.register_fake("mnnvl_ar::all_reduce_rms_norm_out")
def _(*arguments: object, **choice: object) -> None:
    _know_in_inductor()


def _know_in_inductor() -> None:
    """Makes the ops known fallbacks of Inductor, with contiguous inputs. Unknown, each one that is met has the whole
    graph dumped as a string, which can stall a compile for minutes; on the allow-list alone, it would get inputs of
    any layout.

    Called by the fakes: what Inductor lowers has been traced through them once Inductor was there, and importing it,
    which takes seconds, is left to those who compile.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    names = {f"mnnvl_ar::{name}" for name in NAMES}
    if lowering is None or names <= set(lowering.FALLBACK_ALLOW_LIST):
        return
    for op in (all_reduce, all_reduce_out, all_reduce_rms_norm, all_reduce_rms_norm_out):
        if op not in lowering.lowerings:
            lowering.make_fallback(op, lowering.require_contiguous, warn=False)
    lowering.FALLBACK_ALLOW_LIST.update(names)
