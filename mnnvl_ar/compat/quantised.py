"""FlashInfer's patterns with a quantised output, by our ops. `calls.fused` has checked what all patterns share.

    2, 4    static FP8: quant_out, by `scale_factor`, which is multiplied in to get elements back
    3, 5    NVFP4: quant_out [tokens, hidden / 2] and scale_out, by `scale_factor`, which is multiplied in to get codes
    8, 9    FP8 by groups of `block_quant_group_size`, 128: quant_out and scale_out, exponents packed in an int32
    10, 11  FP8 with a scale a row: quant_out and scale_out [tokens, 1]
    13, 14  MXFP8: quant_out and scale_out

4, 5, 9, 11 and 14 store the norm, too. Of the others a norm_out that is given is left alone (vLLM hands its input, or
scratch). What is returned is FlashInfer's answer: quant_out; of 4, 5, 9 and 11, norm_out where the workspace poses as
"trtllm". Outputs that are left out are made. quant_out may have another shape than `input`, as long as its rows are the
same.

`layout_code` says how scale_out of 3, 5, 13 and 14 lies: None or 0, tiles of 128 by 4; 2, linear. 1, tiles of 8 by 4,
is refused, as FlashInfer's mnnvl refuses it. That scale_out may be larger than it need be, and of any shape; NVFP4's
may be uint8 or, as vLLM makes it, int32 of four scales each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mnnvl_ar import ops, scales
from mnnvl_ar.compat.patterns import PATTERNS
from mnnvl_ar.scales import GROUP, BlockLayout, GroupScales

FP8, BYTES = torch.float8_e4m3fn, torch.uint8
_PAIRS = getattr(torch, "float4_e2m1fn_x2", BYTES)


def _inputs(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    return given["input"], given["residual_in"], given["rms_gamma"], given["rms_eps"]


def _place(x: torch.Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _factor(given: dict[str, Any], kind: str) -> torch.Tensor:
    """The scale that a call is given, of one element: a number is made a tensor, and of several the first is read."""
    factor = given["scale_factor"]
    if factor is None:
        raise ValueError(f"scale_factor: a pattern of {kind} needs it")
    if not isinstance(factor, torch.Tensor):
        return torch.full((1,), float(factor), dtype=torch.float32, device=given["input"].device)
    return factor.view(-1)[:1] if factor.numel() > 1 else factor


def _no_factor(given: dict[str, Any], kind: str) -> None:
    if given["scale_factor"] is not None:
        raise ValueError(f"scale_factor: a pattern of {kind} does not read it")


def _layout(given: dict[str, Any]) -> BlockLayout:
    code = given["layout_code"]
    if code is not None and code not in (0, 2):
        raise ValueError(f"layout_code: is {code}, wanted 0 (SWIZZLED_128x4) or 2 (LINEAR)")
    return BlockLayout(code or 0)


def _scale_out(given: dict[str, Any], made: torch.Tensor, *alike: torch.dtype) -> torch.Tensor:
    """What is given, as `made` is: of another dtype that is meant alike, or with bytes to spare."""
    scale: torch.Tensor | None = given["scale_out"]
    if scale is None:
        return made
    if scale.dtype in alike and scale.is_contiguous():
        scale = scale.view(-1).view(made.dtype)
    return scale.view(-1)[: made.numel()] if scale.is_contiguous() and scale.numel() > made.numel() else scale


def static_fp8(given: dict[str, Any], handle: int, outputs: Any, **choice: Any) -> None:
    if given["scale_out"] is not None:
        raise ValueError("scale_out: a pattern of static FP8 does not write it")
    quant, norm, residual = outputs
    factor = _factor(given, "static FP8")
    ops.all_reduce_rms_norm_static_fp8_out(*_inputs(given), factor, quant, norm, residual, handle, **choice)


def per_token_fp8(given: dict[str, Any], handle: int, outputs: Any, **choice: Any) -> None:
    _no_factor(given, "FP8 with a scale a row")
    quant, norm, residual = outputs
    x, scale = given["input"], given["scale_out"]
    if scale is None:
        scale = scales.per_token_fp8(_place(x)[0], device=x.device)
    ops.all_reduce_rms_norm_per_token_fp8_out(*_inputs(given), quant, scale, norm, residual, handle, **choice)


def per_token_group_fp8(given: dict[str, Any], handle: int, outputs: Any, **choice: Any) -> None:
    _no_factor(given, "FP8 by groups")
    if given["block_quant_group_size"] != GROUP:
        raise ValueError(f"block_quant_group_size: is {given['block_quant_group_size']}, wanted {GROUP}")
    quant, norm, residual = outputs
    x, scale, kind = given["input"], given["scale_out"], GroupScales.UE8M0
    if scale is None:
        scale = scales.per_token_group_fp8(*_place(x), kind, device=x.device)
    ops.all_reduce_rms_norm_per_token_group_fp8_out(
        *_inputs(given), quant, scale, norm, residual, handle, scales=int(kind), **choice
    )


def mxfp8(given: dict[str, Any], handle: int, outputs: Any, **choice: Any) -> None:
    _no_factor(given, "MXFP8")
    quant, norm, residual = outputs
    x, layout = given["input"], _layout(given)
    scale = _scale_out(given, scales.mxfp8(*_place(x), layout, device=x.device))
    ops.all_reduce_rms_norm_mxfp8_out(
        *_inputs(given), quant, scale, norm, residual, handle, layout=int(layout), **choice
    )


def nvfp4(given: dict[str, Any], handle: int, outputs: Any, **choice: Any) -> None:
    quant, norm, residual = outputs
    x, layout, factor = given["input"], _layout(given), _factor(given, "NVFP4")
    scale = _scale_out(given, scales.nvfp4(*_place(x), layout, device=x.device), BYTES, torch.int32)
    ops.all_reduce_rms_norm_nvfp4_out(
        *_inputs(given), factor, quant, scale, norm, residual, handle, layout=int(layout), **choice
    )


# By the epilogue that a pattern names.
QUANTISED: dict[str, Callable[..., None]] = {
    "fp8": static_fp8,
    "nvfp4": nvfp4,
    "group fp8": per_token_group_fp8,
    "token fp8": per_token_fp8,
    "mxfp8": mxfp8,
}


def quantised(pattern: int, given: dict[str, Any], handle: int, backend: str, **choice: Any) -> torch.Tensor:
    """`given`: the arguments of `allreduce_fusion` by their names. Errors: as `calls.fused`."""
    call, with_norm = QUANTISED[PATTERNS[pattern].epilogue], PATTERNS[pattern].norm
    x = given["input"]
    for name in ("residual_in", "rms_gamma"):
        if given[name] is None:
            raise ValueError(f"{name}: pattern {pattern} needs it")
    if given["output"] is not None:
        raise ValueError(f"output: pattern {pattern} does not write it")
    shape, dtype = (x.shape, FP8) if call is not nvfp4 else ((*x.shape[:-1], x.shape[-1] // 2), BYTES)
    answer: torch.Tensor | None = given["quant_out"]
    if answer is None:
        answer = torch.empty(shape, dtype=dtype, device=x.device)
    has_rows = answer.numel() == torch.Size(shape).numel() and answer.is_contiguous()
    quant_out = answer.view(shape) if has_rows else answer
    if quant_out.dtype == _PAIRS and call is nvfp4:
        quant_out = quant_out.view(BYTES)
    norm_out: torch.Tensor | None = given["norm_out"] if with_norm else None
    if with_norm and norm_out is None:
        norm_out = torch.empty_like(x)
    residual_out = given["residual_out"] if given["residual_out"] is not None else torch.empty_like(x)
    call(given, handle, (quant_out, norm_out, residual_out), **choice)
    return norm_out if norm_out is not None and backend == "trtllm" and call is not mxfp8 else answer
