"""Inductor calls the ops as they are, on inputs laid out as eager calls have them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from mnnvl_ar._library import ops


def know(names: Iterable[str]) -> None:
    """Makes these ops known fallbacks of Inductor. Unknown, each one that is met has the whole graph dumped as a
    string, which can stall a compile for minutes; on the allow-list alone, it would get inputs of any layout.

    Called by their fake kernels: what Inductor lowers has been traced through them once Inductor was there, and
    importing it, which takes seconds, is left to those who compile.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None:
        return
    unknown = [name for name in names if f"mnnvl_ar::{name}" not in lowering.FALLBACK_ALLOW_LIST]
    for name in unknown:
        op = getattr(ops, name).default
        if op not in lowering.lowerings:
            lowering.make_fallback(op, _laid_out, warn=False)
    lowering.FALLBACK_ALLOW_LIST.update(f"mnnvl_ar::{name}" for name in unknown)


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
