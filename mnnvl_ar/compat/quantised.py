"""FlashInfer's patterns with a quantised output, by our ops. `calls.fused` has checked what all patterns share.

    2, 4    static FP8: quant_out, by `scale_factor`; 4 stores the norm, too
    10, 11  FP8 with a scale a row: quant_out and scale_out [tokens, 1]; 11 stores the norm, too

Of 2 and 10, a norm_out that is given is left alone (vLLM hands its input, or scratch). What is returned is FlashInfer's
answer: quant_out; of 4 and 11, norm_out where the workspace poses as "trtllm".
Outputs that are left out are made. quant_out may have another shape than `input`, as long as its rows are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mnnvl_ar import ops

CODES = torch.float8_e4m3fn


def static_fp8(given: dict[str, Any], handle: int, **choice: Any) -> None:
    factor = given["scale_factor"]
    if factor is None:
        raise ValueError("scale_factor: a pattern of static FP8 needs it")
    if not isinstance(factor, torch.Tensor):
        factor = torch.full((1,), float(factor), dtype=torch.float32, device=given["input"].device)
    elif factor.numel() > 1:
        factor = factor.view(-1)[:1]  # FlashInfer reads the first
    if given["scale_out"] is not None:
        raise ValueError("scale_out: a pattern of static FP8 does not write it")
    ops.all_reduce_rms_norm_static_fp8_out(
        given["input"],
        *(given["residual_in"], given["rms_gamma"], given["rms_eps"], factor),
        *(given["quant_out"], given["norm_out"], given["residual_out"]),
        handle,
        **choice,
    )


def per_token_fp8(given: dict[str, Any], handle: int, **choice: Any) -> None:
    if given["scale_factor"] is not None:
        raise ValueError("scale_factor: a pattern of FP8 with a scale a row does not read it")
    x = given["input"]
    if given["scale_out"] is None:
        given["scale_out"] = torch.empty(x.numel() // x.shape[-1], 1, dtype=torch.float32, device=x.device)
    ops.all_reduce_rms_norm_per_token_fp8_out(
        x,
        *(given["residual_in"], given["rms_gamma"], given["rms_eps"]),
        *(given["quant_out"], given["scale_out"], given["norm_out"], given["residual_out"]),
        handle,
        **choice,
    )


# By pattern: the call, and whether the norm is stored.
QUANTISED: dict[int, tuple[Callable[..., None], bool]] = {
    2: (static_fp8, False),
    4: (static_fp8, True),
    10: (per_token_fp8, False),
    11: (per_token_fp8, True),
}


def quantised(pattern: int, given: dict[str, Any], handle: int, backend: str, **choice: Any) -> torch.Tensor:
    """`given`: the arguments of `allreduce_fusion` by their names. Errors: as `calls.fused`."""
    call, with_norm = QUANTISED[pattern]
    x = given["input"]
    for name in ("residual_in", "rms_gamma"):
        if given[name] is None:
            raise ValueError(f"{name}: pattern {pattern} needs it")
    if given["output"] is not None:
        raise ValueError(f"output: pattern {pattern} does not write it")
    answer: torch.Tensor = torch.empty_like(x, dtype=CODES) if given["quant_out"] is None else given["quant_out"]
    has_rows = answer.numel() == x.numel() and answer.is_contiguous()
    quant_out = answer.view(x.shape) if has_rows else answer
    norm_out: torch.Tensor | None = given["norm_out"] if with_norm else None
    if with_norm and norm_out is None:
        norm_out = torch.empty_like(x)
    residual_out = given["residual_out"] if given["residual_out"] is not None else torch.empty_like(x)
    made = {"quant_out": quant_out, "norm_out": norm_out, "residual_out": residual_out}
    call({**given, **made}, handle, **choice)
    return norm_out if norm_out is not None and backend == "trtllm" else answer
