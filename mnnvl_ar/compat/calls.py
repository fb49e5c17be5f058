"""`allreduce_fusion` on a workspace of ours: FlashInfer's arguments, of every release, to our ops.

What a pattern does not read is ignored, as FlashInfer does; an output that it does not write is an error, since the
caller would read whatever was there. An output that it does write may be left out, and is then made. Meaningless here,
and ignored: `use_oneshot` (a table of measurements chooses, with the same bits), `fp32_acc` (sums are always of fp32),
`layout_code` where no scales are written, `moe_finalize_backend`.

`launch_with_pdl`: False, and this kernel begins when its predecessor has ended, and the next one when this has.
`trigger_completion_at_end`: False permits the next kernel to be launched early, True forbids it. One that is launched
early must wait (griddepcontrol.wait) before it reads what this call writes, as with FlashInfer.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from mnnvl_ar import ops
from mnnvl_ar.compat.patterns import NORM, PATTERNS, SUM, refusal
from mnnvl_ar.compat.quantised import quantised
from mnnvl_ar.compat.workspace import FusionWorkspace
from mnnvl_ar.errors import MnnvlArError
from mnnvl_ar.ops import Pdl

_OFF, _LATE, _AS_THE_WORKSPACE = int(Pdl.OFF), int(Pdl.LATE), int(Pdl.AUTO)
made = [0] * 16  # calls by pattern that this process has made, or put into graphs: one that is replayed counts once
_THEIRS = {
    "x": "input",
    "residual": "residual_in",
    "weight": "rms_gamma",
    "eps": "rms_eps",
    "scale": "scale_factor",
    "global_scale": "scale_factor",
    "out": "output",
}
_NAMES = re.compile(rf"(?<![\w./])({'|'.join(_THEIRS)})(?=[:']|$)")


def fused(
    input: torch.Tensor,
    workspace: FusionWorkspace,
    pattern: int,
    launch_with_pdl: bool = False,
    trigger_completion_at_end: bool = True,
    output: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    quant_out: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    residual_in: torch.Tensor | None = None,
    rms_gamma: torch.Tensor | None = None,
    rms_eps: float = 1e-6,
    scale_factor: torch.Tensor | float | None = None,
    layout_code: int | None = None,
    use_oneshot: bool | None = None,
    fp32_acc: bool = False,
    moe_reduction_device_num_experts: int | None = None,
    moe_reduction_scale_input: torch.Tensor | None = None,
    moe_reduction_active_experts_token_input: torch.Tensor | None = None,
    moe_reduction_token_input: torch.Tensor | None = None,
    expanded_idx_to_permuted_idx: torch.Tensor | None = None,
    expert_scale_factor: torch.Tensor | None = None,
    shared_expert_output: torch.Tensor | None = None,
    block_quant_group_size: int | None = None,
    weight_bias: float = 0.0,
    *,
    moe_finalize_backend: str | None = None,
    **newer: Any,
) -> torch.Tensor:
    """The sum over ranks of `input` (pattern 0), the norm of that and `residual_in` (pattern 1), or the norm quantised
    (`quantised.py`).

    input:        [tokens, hidden] (or [..., hidden]), bf16, fp16 or fp32, contiguous; at most the bytes that the
                  workspace was promised for
    output:       pattern 0: like `input`, or `input` itself; what is returned
    residual_out, norm_out: pattern 1: like `input`, or `input` or `residual_in` itself; norm_out is returned
    residual_in, rms_gamma, rms_eps, weight_bias: pattern 1: like `input`; [hidden] in its dtype or fp32; fp32; fp32

    Errors, before anything is launched: `ValueError` for a pattern, a missing argument, an output that is not written,
    or too many bytes; `TypeError` for an argument that is not known; `MnnvlArError` for a destroyed workspace;
    `RuntimeError` for a tensor that does not fit, and for a broken workspace. Each names what it is about.
    """
    handle = workspace.handle
    if not handle:
        raise MnnvlArError("workspace: was destroyed; make another one, on all ranks")
    if newer and any(value is not None for value in newer.values()):
        raise TypeError(f"{next(iter(newer))}: mnnvl_ar's allreduce_fusion does not know this argument")
    if input.nbytes > workspace.promised:
        raise ValueError(f"input: has {input.nbytes} bytes, the workspace was made for {workspace.promised} at most")
    pdl = _AS_THE_WORKSPACE if launch_with_pdl else _OFF
    if launch_with_pdl and trigger_completion_at_end and workspace.lets_begin_early(input):
        pdl = _LATE
    if pattern == NORM:
        if output is not None or quant_out is not None or scale_out is not None:
            raise _not_written(pattern, output=output, quant_out=quant_out, scale_out=scale_out)
        if residual_in is None or rms_gamma is None:
            raise ValueError(f"{'residual_in' if residual_in is None else 'rms_gamma'}: pattern 1 needs it")
        if norm_out is None:
            norm_out = torch.empty_like(input)
        if residual_out is None:
            residual_out = torch.empty_like(input)
        try:
            if pdl == _AS_THE_WORKSPACE and not weight_bias:  # a keyword that an op is given costs half a microsecond
                ops.all_reduce_rms_norm_out(input, residual_in, rms_gamma, rms_eps, norm_out, residual_out, handle)
            else:
                ops.all_reduce_rms_norm_out(
                    *(input, residual_in, rms_gamma, rms_eps, norm_out, residual_out, handle),
                    weight_bias=weight_bias,
                    pdl=pdl,
                )
        except RuntimeError as error:
            raise _in_their_words(error) from None
        made[NORM] += 1
        return norm_out
    if pattern == SUM:
        if residual_out is not None or norm_out is not None or quant_out is not None or scale_out is not None:
            raise _not_written(
                pattern, residual_out=residual_out, norm_out=norm_out, quant_out=quant_out, scale_out=scale_out
            )
        try:
            if output is None:
                output = ops.all_reduce(input, handle, pdl=pdl)
            else:
                ops.all_reduce_out(input, output, handle, pdl=pdl)
        except RuntimeError as error:
            raise _in_their_words(error) from None
        made[SUM] += 1
        return output
    if pattern in PATTERNS:
        given = {
            "input": input, "residual_in": residual_in, "rms_gamma": rms_gamma, "rms_eps": rms_eps, "output": output,
            "scale_factor": scale_factor, "quant_out": quant_out, "scale_out": scale_out, "norm_out": norm_out,
            "residual_out": residual_out, "layout_code": layout_code,
            "block_quant_group_size": block_quant_group_size,
        }  # fmt: skip
        try:
            answer = quantised(pattern, given, handle, workspace.backend, weight_bias=weight_bias, pdl=pdl)
        except RuntimeError as error:
            raise _in_their_words(error) from None
        made[pattern] += 1
        return answer
    raise refusal(pattern)


def _not_written(pattern: int, **outputs: torch.Tensor | None) -> ValueError:
    name = next(name for name, value in outputs.items() if value is not None)
    return ValueError(f"{name}: pattern {pattern} does not write it")


def _in_their_words(error: RuntimeError) -> RuntimeError:
    """An op's error, with FlashInfer's names for the arguments that it is about. Our own say what they say, and hold it
    in attributes."""
    if isinstance(error, MnnvlArError):
        return error
    return type(error)(_NAMES.sub(lambda found: _THEIRS[found[1]], str(error)))
