"""Ops with a quantised output, each an op of the bench: what a call writes beside the residual, and what that should
hold. The norm itself is not stored, as a server that quantises it asks for.

A quantised op is `mnnvl_ar.ops.all_reduce_rms_norm_<kind>_out` with its options; cells name it by its key in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # whoever only parses options need not wait for PyTorch
    import torch

SCALE = 0.25  # static FP8's and NVFP4's, of norms about 1


@dataclass(frozen=True)
class Kind:
    """op: without its prefix and `_out`. scale: the figure that it is given. outputs(tokens, hidden, device): the
    tensors that it writes. of_norm(norm): what they should hold. options: keywords of the op. block: what hidden has to
    be a multiple of."""

    op: str
    outputs: Callable[[int, int, torch.device], tuple[torch.Tensor, ...]]
    of_norm: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    scale: float | None = None
    options: dict[str, int] = field(default_factory=dict)
    block: int = 8


def _codes(tokens: int, hidden: int, device: torch.device) -> torch.Tensor:
    import torch

    return torch.empty(tokens, hidden, dtype=torch.float8_e4m3fn, device=device)


def _static(norm: torch.Tensor) -> tuple[torch.Tensor, ...]:
    from mnnvl_ar import reference

    return (reference.static_fp8(norm, SCALE),)


def _per_token_outputs(tokens: int, hidden: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    from mnnvl_ar import scales

    return _codes(tokens, hidden, device), scales.per_token_fp8(tokens, device=device)


def _per_token(norm: torch.Tensor) -> tuple[torch.Tensor, ...]:
    from mnnvl_ar import reference

    return reference.per_token_fp8(norm)


def _group(number: int, name: str) -> Kind:
    def outputs(tokens: int, hidden: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        from mnnvl_ar.scales import GroupLayout, per_token_group_fp8

        aligned = GroupLayout.TMA_ALIGNED
        return _codes(tokens, hidden, device), per_token_group_fp8(tokens, hidden, number, aligned, device=device)

    def of_norm(norm: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from mnnvl_ar import reference

        return reference.per_token_group_fp8(norm, name, "tma_aligned")

    return Kind("per_token_group_fp8", outputs, of_norm, options={"scales": number}, block=128)


def _mxfp8_outputs(tokens: int, hidden: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    from mnnvl_ar import scales

    return _codes(tokens, hidden, device), scales.mxfp8(tokens, hidden, device=device)


def _mxfp8(norm: torch.Tensor) -> tuple[torch.Tensor, ...]:
    from mnnvl_ar import reference

    return reference.mxfp8(norm)


def _nvfp4_outputs(tokens: int, hidden: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    import torch

    from mnnvl_ar import scales

    codes = torch.empty(tokens, hidden // 2, dtype=torch.uint8, device=device)
    return codes, scales.nvfp4(tokens, hidden, device=device)


def _nvfp4(norm: torch.Tensor) -> tuple[torch.Tensor, ...]:
    from mnnvl_ar import reference

    return reference.nvfp4(norm, SCALE)


KINDS = {
    "static_fp8": Kind("static_fp8", lambda *size: (_codes(*size),), _static, scale=SCALE),
    "per_token_fp8": Kind("per_token_fp8", _per_token_outputs, _per_token),
    "group_fp8": _group(0, "fp32"),
    "group_fp8_power": _group(1, "power_of_two"),
    "group_fp8_packed": _group(2, "ue8m0"),
    "mxfp8": Kind("mxfp8", _mxfp8_outputs, _mxfp8, block=32),
    "nvfp4": Kind("nvfp4", _nvfp4_outputs, _nvfp4, scale=SCALE, block=16),
}


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage, those that pad it included."""
    import torch

    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def bind(
    kind: Kind, inputs: Any, outputs: Any, eps: float, handle: int, choice: dict[str, Any], with_norm: bool
) -> Callable[[int], None]:
    """Call i on workspace `handle`: residual in place, the norm quantised into buffers of its own, and stored besides
    if `with_norm`."""
    import torch

    from mnnvl_ar import ops

    op: Any = getattr(ops, f"all_reduce_rms_norm_{kind.op}_out")
    xs, residuals, quants = inputs.xs, outputs.residuals, outputs.quants
    norm = torch.empty_like(xs[0]) if with_norm else None
    given = () if kind.scale is None else (torch.tensor([kind.scale], device=xs[0].device),)

    def call(i: int) -> None:
        residual, quant = residuals[i % len(residuals)], quants[i % len(quants)]
        x = xs[i % len(xs)]
        op(x, residual, inputs.weight, eps, *given, *quant, norm, residual, handle, **kind.options, **choice)

    return call
