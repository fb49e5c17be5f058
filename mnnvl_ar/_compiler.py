"""What PyTorch's compiler is told of the ops: shapes of what they return, and that Inductor calls them as they are.

Importing it registers this. Only `ops` does.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from mnnvl_ar import scales
from mnnvl_ar._library import ops

QUANTISED = ("static_fp8", "per_token_fp8", "per_token_group_fp8", "mxfp8", "nvfp4")
FUNCTIONAL = ("all_reduce", "all_reduce_rms_norm", *(f"all_reduce_rms_norm_{kind}" for kind in QUANTISED))
NAMES = tuple(name for each in FUNCTIONAL for name in (each, f"{each}_out"))


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"mnnvl_ar::{name}")


@_fake("all_reduce")
def _(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    _know_in_inductor()
    return torch.empty_like(x)


@_fake("all_reduce_rms_norm")
def _(x: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
    _know_in_inductor()
    return torch.empty_like(x), torch.empty_like(x)


def _rows(x: torch.Tensor, with_norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """norm and residual_out."""
    _know_in_inductor()
    return torch.empty_like(x) if with_norm else x.new_empty(0), torch.empty_like(x)


def _codes(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.float8_e4m3fn)


def _place(x: torch.Tensor) -> tuple[int, int]:
    return math.prod(x.shape[:-1]), x.shape[-1]


@_fake("all_reduce_rms_norm_static_fp8")
def _(x: torch.Tensor, *_: object, with_norm: bool = False, **__: object) -> tuple[torch.Tensor, ...]:
    return _codes(x), *_rows(x, with_norm)


@_fake("all_reduce_rms_norm_per_token_fp8")
def _(x: torch.Tensor, *_: object, with_norm: bool = False, **__: object) -> tuple[torch.Tensor, ...]:
    return _codes(x), scales.per_token_fp8(_place(x)[0], device=x.device), *_rows(x, with_norm)


@_fake("all_reduce_rms_norm_per_token_group_fp8")
def _(
    x: torch.Tensor, *_: object, scales: int = 0, layout: int = -1, with_norm: bool = False, **__: object
) -> tuple[torch.Tensor, ...]:
    return _codes(x), _group_scales(*_place(x), scales, layout, device=x.device), *_rows(x, with_norm)


_group_scales = scales.per_token_group_fp8


@_fake("all_reduce_rms_norm_mxfp8")
def _(x: torch.Tensor, *_: object, layout: int = 0, with_norm: bool = False, **__: object) -> tuple[torch.Tensor, ...]:
    return _codes(x), scales.mxfp8(*_place(x), layout, device=x.device), *_rows(x, with_norm)


@_fake("all_reduce_rms_norm_nvfp4")
def _(x: torch.Tensor, *_: object, layout: int = 0, with_norm: bool = False, **__: object) -> tuple[torch.Tensor, ...]:
    codes = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    return codes, scales.nvfp4(*_place(x), layout, device=x.device), *_rows(x, with_norm)


def _writes_only(*_: object, **__: object) -> None:
    _know_in_inductor()


for _name in FUNCTIONAL:
    _fake(f"{_name}_out")(_writes_only)


def _know_in_inductor() -> None:
    """Makes the ops known fallbacks of Inductor, with inputs laid out as eager calls have them. Unknown, each one that
    is met has the whole graph dumped as a string, which can stall a compile for minutes; on the allow-list alone, it
    would get inputs of any layout.

    Called by the fakes: what Inductor lowers has been traced through them once Inductor was there, and importing it,
    which takes seconds, is left to those who compile.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    names = {f"mnnvl_ar::{name}" for name in NAMES}
    if lowering is None or names <= set(lowering.FALLBACK_ALLOW_LIST):
        return
    for name in NAMES:
        op = getattr(ops, name).default
        if op not in lowering.lowerings:
            lowering.make_fallback(op, _laid_out, warn=False)
    lowering.FALLBACK_ALLOW_LIST.update(names)


def _laid_out(node: Any, *arguments: Any, **keywords: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layout constraint of Inductor's: tensors contiguous, but scales that a call writes, whose strides say how."""
    lowering = sys.modules["torch._inductor.lowering"]
    laid_out = []
    for schema, argument, traced in zip(node.target._schema.arguments, arguments, node.args, strict=False):
        if schema.name == "scale_out":
            strides = traced.meta["val"].stride()
            laid_out.append(lowering.ir.ExternKernel.require_exact_strides(argument, strides))
        else:
            laid_out.append(lowering.require_contiguous(node, argument)[0][0])
    return tuple(laid_out), keywords
