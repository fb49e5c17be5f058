"""The ops, `torch.ops.mnnvl_ar.*`. They live in C++ (csrc/torch/ops); here are their names, their documentation, and
what PyTorch's compiler is told of them: the body of a function here makes what the op returns, empty.

All ranks of the group make the same calls, with the same shapes, in the same order. CUDA tensors run on the current
stream and may be captured; CPU tensors run at once.

None has a gradient. Autograd is not told what they do: PyTorch warns in `backward()`, and nothing flows back. An
`_out` op does not bump the version of what it writes, so autograd does not see that a tensor it has saved was
overwritten. They are for `torch.no_grad()` and `torch.inference_mode()`. (An error instead is not to be had: the part
of PyTorch that is the same in all releases, which is all that `_C.so` uses, knows neither `requires_grad` nor
versions.)
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any, TypeVar, cast

import torch

import mnnvl_ar.scales as scale_tensors
from mnnvl_ar import _inductor
from mnnvl_ar._library import ops

NAMES: list[str] = []  # of all ops that are listed here


class Strategy(IntEnum):
    """How ranks share the work: one hop with R - 1 times the bytes on the link, or two with 2 (R - 1) / R times."""

    AUTO = -1  # of a call: as its workspace has it; of a workspace: by what was measured (mnnvl_ar.tuning)
    ONE_SHOT = 0
    TWO_SHOT = 1


class Pdl(IntEnum):
    """Programmatic dependent launch. OFF: a call begins when its predecessor has ended, and the next kernel when the
    call has: quickest between kernels that let nothing begin early, as those of most GEMMs do. LATE: this kernel may be
    launched before its predecessor ends. EARLY: also, the next kernel may be launched before this one ends; a next
    kernel that reads our outputs must then wait for us, as kernels without the launch attribute always do."""

    AUTO = -1  # of a call: as its workspace has it; of a workspace: by what was measured (mnnvl_ar.tuning)
    OFF = 0
    LATE = 1
    EARLY = 2


_Contract = TypeVar("_Contract", bound=Callable[..., Any])


def _op(contract: _Contract) -> _Contract:
    """The op that has the name of `contract`, with its signature and docstring: to readers and type checkers it is
    `contract`, to PyTorch an `OpOverload`, whose fake kernel is the body of `contract`.
    """

    signature = inspect.signature(contract)

    @functools.wraps(contract)
    def fake(*arguments: Any, **options: Any) -> Any:
        _inductor.know(NAMES)
        _check_one_device(signature.bind(*arguments, **options).arguments)
        return contract(*arguments, **options)

    torch.library.register_fake(f"mnnvl_ar::{contract.__name__}", fake)
    NAMES.append(contract.__name__)
    packet = getattr(ops, contract.__name__)
    packet.__doc__ = packet.default.__doc__ = contract.__doc__
    packet.default.__signature__ = signature
    return cast(_Contract, packet.default)


def _check_one_device(arguments: dict[str, Any]) -> None:
    """As the op itself does. One tensor on "meta" is enough for PyTorch to call the fake kernel instead of it."""
    x = arguments["x"]
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device != x.device:
            raise RuntimeError(f"{name}: is on {value.device}, wanted {x.device} like x")


def _rows(x: torch.Tensor, with_norm: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """norm and residual_out."""
    return torch.empty_like(x) if with_norm else x.new_empty(0), torch.empty_like(x)


def _codes(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.float8_e4m3fn)


def _place(x: torch.Tensor) -> tuple[int, int]:
    return math.prod(x.shape[:-1]), x.shape[-1]


@_op
def all_reduce(x: torch.Tensor, workspace: int, *, strategy: int = -1, pdl: int = -1, tag: int = 0) -> torch.Tensor:
    """The sum over ranks of `x`, a new tensor like `x`.

    x:         this rank's share: bf16, fp16 or fp32, contiguous, 16-byte aligned; the same shape and dtype on all
               ranks. Any size that is a multiple of 16 bytes will do. [..., hidden] with rows of a multiple of 16
               bytes up to 32 KiB goes as it is; what has no such rows, as rows of another shape, which errors name
    workspace: `Workspace.handle`
    strategy:  a `Strategy`; -1: the workspace's
    pdl:       a `Pdl`; -1: the workspace's
    tag:       0 to 3, the same on all ranks. Two micro-batches that share a workspace, of one shape, whose calls ranks
               might make in another order, would sum the one's rows with the other's: with a tag each, that is the
               error `CallMismatch`

    A call of more rows than a slot of the workspace holds runs as several launches, with the same bits.
    Errors: `RuntimeError`, naming argument, got and wanted, before anything is launched. `RuntimeError` too where the
    workspace broke in an earlier call, on the host also in this one; `Workspace.check` raises that as its own kind. A
    call that failed leaves NaN, but in what had come before it failed: on a GPU parts of rows, of 16 bytes at least;
    `norm` and what is made of it are NaN for the whole row.
    Source: mnnvl_ar design; docs/numerics.md for every bit of the results.
    """
    return torch.empty_like(x)


@_op
def all_reduce_out(
    x: torch.Tensor, out: torch.Tensor, workspace: int, *, strategy: int = -1, pdl: int = -1, tag: int = 0
) -> None:
    """`all_reduce` into `out`.

    out: like `x`: rows, dtype, device, contiguous, 16-byte aligned. May be `x` itself, but not a part of it

    The rest, and errors, as in `all_reduce`.
    """


@_op
def all_reduce_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    workspace: int,
    *,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
    tag: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(norm, residual_out)`, two new tensors like `x`: residual_out = sum over ranks of `x` + residual, norm =
    residual_out / sqrt(mean of residual_out ** 2 over hidden + eps) * (weight_bias + weight).

    x:           [..., hidden], this rank's share, as in `all_reduce`, but with rows of a multiple of 16 bytes up to
                 32 KiB
    residual:    rows, dtype and device like `x`, the same bits on all ranks
    weight:      [hidden], in the dtype of `x` or fp32, the same bits on all ranks
    eps:         added to the mean square, in fp32
    weight_bias: added to `weight`, in fp32: 1.0 for Gemma's norm
    workspace, strategy, pdl, tag: as in `all_reduce`

    Errors and source: as in `all_reduce`.
    """
    return _rows(x)


@_op
def all_reduce_rms_norm_out(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    norm_out: torch.Tensor,
    residual_out: torch.Tensor,
    workspace: int,
    *,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
    tag: int = 0,
) -> None:
    """`all_reduce_rms_norm` into `norm_out` and `residual_out`.

    norm_out, residual_out: like `x`: rows, dtype, device, contiguous, 16-byte aligned. Each may be `x` or `residual`
                            itself, but not a part of one, and not the other output

    The rest, and errors, as in `all_reduce_rms_norm`.
    """


@_op
def all_reduce_rms_norm_static_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scale: torch.Tensor,
    workspace: int,
    *,
    with_norm: bool = False,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
    tag: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(quant, norm, residual_out)`, three new tensors: norm and residual_out as in `all_reduce_rms_norm`, and quant =
    norm as stored, by FP8 codes: norm is about quant * scale.

    x:         [..., hidden], as in `all_reduce_rms_norm`, of bf16 or fp16
    scale:     fp32, of one element, on the device of `x`; read when the call runs. Codes are multiplied by it to get
               norm back. The same bits on all ranks
    with_norm: whether norm is stored; if not, it is returned with no elements
    quant:     float8_e4m3fn in the shape of `x`: e4m3(norm * (1 / scale)), saturating at 448; NaN is 0x7F
    residual_out, and norm where it is wanted, are like `x`; residual, weight, eps, workspace and the rest as in
    `all_reduce_rms_norm`.

    Errors and source: as in `all_reduce`; fp32 rows, too.
    """
    return _codes(x), *_rows(x, with_norm)


@_op
def all_reduce_rms_norm_static_fp8_out(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scale: torch.Tensor,
    quant_out: torch.Tensor,
    norm_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    workspace: int,
    *,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
    tag: int = 0,
) -> None:
    """`all_reduce_rms_norm_static_fp8` into `quant_out`, `norm_out` and `residual_out`.

    quant_out:              float8_e4m3fn in the shape of `x`, contiguous, 8-byte aligned, in memory of its own
    norm_out, residual_out: like `x`, as in `all_reduce_rms_norm_out`; norm_out None: it is not stored

    The rest, and errors, as in `all_reduce_rms_norm_static_fp8`.
    """


@_op
def all_reduce_rms_norm_per_token_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    workspace: int,
    *,
    with_norm: bool = False,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
    tag: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(quant, scale, norm, residual_out)`, four new tensors: norm and residual_out as in `all_reduce_rms_norm`, and
    quant = norm as stored, by FP8 codes with a scale for each row: norm is about quant * scale.

    x:         [..., hidden], as in `all_reduce_rms_norm`, of bf16 or fp16; M rows
    with_norm: whether norm is stored; if not, it is returned with no elements
    quant:     float8_e4m3fn in the shape of `x`: e4m3(norm / scale); NaN is 0x7F
    scale:     fp32 [M, 1]: the row's largest magnitude / 448, but no less than 1 / (448 * 512); NaN if the row has one
    residual_out, and norm where it is wanted, are like `x`; residual, weight, eps, workspace and the rest as in
    `all_reduce_rms_norm`.

    Errors and source: as in `all_reduce`; fp32 rows, too.
    """
    return _codes(x), scale_tensors.per_token_fp8(_place(x)[0], device=x.device), *_rows(x, with_norm)


@_op
def all_reduce_rms_norm_per_token_fp8_out(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    quant_out: torch.Tensor,
    scale_out: torch.Tensor,
    norm_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    workspace: int,
    *,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
    tag: int = 0,
) -> None:
    """`all_reduce_rms_norm_per_token_fp8` into `quant_out`, `scale_out`, `norm_out` and `residual_out`.

    quant_out:              float8_e4m3fn in the shape of `x`, contiguous, 8-byte aligned, in memory of its own
    scale_out:              fp32 [M, 1], contiguous, in memory of its own
    norm_out, residual_out: like `x`, as in `all_reduce_rms_norm_out`; norm_out None: it is not stored

    The rest, and errors, as in `all_reduce_rms_norm_per_token_fp8`.
    """


@_op
def all_reduce_rms_norm_per_token_group_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    workspace: int,
    *,
    scales: int = 0,
    layout: int = -1,
    with_norm: bool = False,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
    tag: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(quant, scale, norm, residual_out)`, four new tensors: norm and residual_out as in `all_reduce_rms_norm`, and
    quant = norm as stored, by FP8 codes with a scale for each 128 neighbouring elements: norm is about quant * scale.

    x:         [..., hidden], as in `all_reduce_rms_norm`, of bf16 or fp16; M rows of a multiple of 128
    scales:    a `GroupScales`: fp32, the group's largest magnitude / 448, but no less than 1e-10 / 448; or the least
               power of two that is no smaller than that and 1e-10, as fp32 or as its exponent biased by 127
    layout:    a `GroupLayout`
    with_norm: whether norm is stored; if not, it is returned with no elements
    quant:     float8_e4m3fn in the shape of `x`: e4m3(norm / scale); NaN is 0x7F
    scale:     as `mnnvl_ar.scales.per_token_group_fp8` allocates it, padding 0; NaN (of an exponent: 0xFF) if the group
               has one
    residual_out, and norm where it is wanted, are like `x`; residual, weight, eps, workspace and the rest as in
    `all_reduce_rms_norm`.

    Errors and source: as in `all_reduce`; fp32 rows, too.
    """
    made = scale_tensors.per_token_group_fp8(*_place(x), scales, layout, device=x.device)
    return _codes(x), made, *_rows(x, with_norm)


@_op
def all_reduce_rms_norm_per_token_group_fp8_out(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    quant_out: torch.Tensor,
    scale_out: torch.Tensor,
    norm_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    workspace: int,
    *,
    scales: int = 0,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
    tag: int = 0,
) -> None:
    """`all_reduce_rms_norm_per_token_group_fp8` into `quant_out`, `scale_out`, `norm_out` and `residual_out`.

    quant_out:              float8_e4m3fn in the shape of `x`, contiguous, 8-byte aligned, in memory of its own
    scale_out:              as `mnnvl_ar.scales.per_token_group_fp8` allocates it, in memory of its own; of fp32 its
                            strides say which layout it has
    norm_out, residual_out: like `x`, as in `all_reduce_rms_norm_out`; norm_out None: it is not stored

    The rest, and errors, as in `all_reduce_rms_norm_per_token_group_fp8`.
    """


@_op
def all_reduce_rms_norm_mxfp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    workspace: int,
    *,
    layout: int = 0,
    with_norm: bool = False,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
    tag: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(quant, scale, norm, residual_out)`, four new tensors: norm and residual_out as in `all_reduce_rms_norm`, and
    quant = norm as stored, by MXFP8: FP8 codes with an exponent for each 32 neighbouring elements: norm is about
    quant * 2 ** (scale - 127).

    x:         [..., hidden], as in `all_reduce_rms_norm`, of bf16 or fp16; M rows of a multiple of 32
    layout:    a `BlockLayout`
    with_norm: whether norm is stored; if not, it is returned with no elements
    quant:     float8_e4m3fn in the shape of `x`: e4m3(norm * 2 ** (127 - scale)); NaN is 0x7F
    scale:     flat uint8, as `mnnvl_ar.scales.mxfp8` allocates it, padding 0: the exponent, biased by 127, of the least
               power of two that is no smaller than the block's largest magnitude / 448; 0xFF if the block has a NaN
    residual_out, and norm where it is wanted, are like `x`; residual, weight, eps, workspace and the rest as in
    `all_reduce_rms_norm`.

    Errors and source: as in `all_reduce`; fp32 rows, too.
    """
    return _codes(x), scale_tensors.mxfp8(*_place(x), layout, device=x.device), *_rows(x, with_norm)


@_op
def all_reduce_rms_norm_mxfp8_out(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    quant_out: torch.Tensor,
    scale_out: torch.Tensor,
    norm_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    workspace: int,
    *,
    layout: int = 0,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
    tag: int = 0,
) -> None:
    """`all_reduce_rms_norm_mxfp8` into `quant_out`, `scale_out`, `norm_out` and `residual_out`.

    quant_out:              float8_e4m3fn in the shape of `x`, contiguous, 8-byte aligned, in memory of its own
    scale_out:              uint8 of any shape with as many bytes as `mnnvl_ar.scales.mxfp8` allocates, contiguous,
                            16-byte aligned, in memory of its own
    norm_out, residual_out: like `x`, as in `all_reduce_rms_norm_out`; norm_out None: it is not stored

    The rest, and errors, as in `all_reduce_rms_norm_mxfp8`.
    """


@_op
def all_reduce_rms_norm_nvfp4(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    global_scale: torch.Tensor,
    workspace: int,
    *,
    layout: int = 0,
    with_norm: bool = False,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
    tag: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(quant, scale, norm, residual_out)`, four new tensors: norm and residual_out as in `all_reduce_rms_norm`, and
    quant = norm as stored, by NVFP4: e2m1 codes with an e4m3 scale for each 16 neighbouring elements, under one scale
    of the whole tensor: norm is about code * scale / global_scale.

    x:            [..., hidden], as in `all_reduce_rms_norm`, of bf16 or fp16; M rows of a multiple of 16
    global_scale: fp32, of one element, on the device of `x`; read when the call runs. Norm is multiplied by it to get
                  codes: the reverse of `all_reduce_rms_norm_static_fp8`. The same bits on all ranks
    layout:       a `BlockLayout`
    with_norm:    whether norm is stored; if not, it is returned with no elements
    quant:        uint8 [..., hidden / 2], element 2i in the low half of byte i
    scale:        flat float8_e4m3fn, as `mnnvl_ar.scales.nvfp4` allocates it, padding 0: e4m3(global_scale * the
                  block's largest magnitude / 6); NaN (0x7F) if the block has one, its codes then say nothing
    residual_out, and norm where it is wanted, are like `x`; residual, weight, eps, workspace and the rest as in
    `all_reduce_rms_norm`.

    Errors and source: as in `all_reduce`; fp32 rows, too.
    """
    codes = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    return codes, scale_tensors.nvfp4(*_place(x), layout, device=x.device), *_rows(x, with_norm)


@_op
def all_reduce_rms_norm_nvfp4_out(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    global_scale: torch.Tensor,
    quant_out: torch.Tensor,
    scale_out: torch.Tensor,
    norm_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    workspace: int,
    *,
    layout: int = 0,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
    tag: int = 0,
) -> None:
    """`all_reduce_rms_norm_nvfp4` into `quant_out`, `scale_out`, `norm_out` and `residual_out`.

    quant_out:              uint8 in the shape of `x` but for half its hidden, contiguous, 4-byte aligned, in memory of
                            its own
    scale_out:              float8_e4m3fn of any shape with as many bytes as `mnnvl_ar.scales.nvfp4` allocates,
                            contiguous, 16-byte aligned, in memory of its own
    norm_out, residual_out: like `x`, as in `all_reduce_rms_norm_out`; norm_out None: it is not stored

    The rest, and errors, as in `all_reduce_rms_norm_nvfp4`.
    """
