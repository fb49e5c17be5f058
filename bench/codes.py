"""Whether a quantised output that a peer made is what the reference makes of the same norm.

Peers' kernels are built with approximate division. Where a scale is a power of two that changes no bit, so that codes
and scales must be equal. Elsewhere a code may be the neighbour of the reference's, of so many of all: those are what
one unit in the last place of a factor moves, and another way of rounding moves more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.quantised import KINDS
from mnnvl_ar import scales
from mnnvl_ar.reference.layouts import swizzled


@dataclass(frozen=True)
class Allowance:
    """codes: steps that a code may be off. most: the share of codes that may be off at all. scales: steps that a scale
    may be off; of an fp32 one units in the last place, which fast division has two of."""

    codes: int = 0
    most: float = 0.0
    scales: int = 0


ALLOWED = {
    "group_fp8_packed": Allowance(),
    "mxfp8": Allowance(),
    "static_fp8": Allowance(codes=1, most=0.03),
    "per_token_fp8": Allowance(codes=1, most=0.05, scales=2),
    "nvfp4": Allowance(codes=1, most=0.05),
}
_NAN = 255  # no neighbour of 448


def judge(
    op: str, norms: Sequence[torch.Tensor], quants: Sequence[tuple[torch.Tensor, ...]], device: torch.device
) -> tuple[dict[str, float], str | None]:
    """`quants` beside the reference's of `norms`, which is evaluated on `device`: (what a row says of it, None or what
    is wrong). Row: `codes_off` and `scales_off`, the shares that are other than the reference's."""
    found = [_steps(op, norm.to(device), quant) for norm, quant in zip(norms, quants, strict=True)]
    codes, of_scales = (torch.cat(each) for each in zip(*found, strict=True))
    row = {"codes_off": _share(codes), "scales_off": _share(of_scales)}
    allowed = ALLOWED[op]
    for name, steps, most in (("codes", codes, allowed.codes), ("scales", of_scales, allowed.scales)):
        if far := int((steps > most).sum()):
            return row, f"{far} of {steps.numel()} {name} are more than {most} off the reference's of that norm"
    if row["codes_off"] > allowed.most:
        return row, f"{row['codes_off']:.2%} of codes are off, wanted {allowed.most:.0%} at most"
    return row, None


def _share(steps: torch.Tensor) -> float:
    return int(steps.count_nonzero()) / max(1, steps.numel())


def _steps(op: str, norm: torch.Tensor, quant: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """How many steps each code and each scale is off, where the norm is."""
    got = [_flat(each).to(norm.device) for each in quant]
    with torch.device(norm.device):
        want = [_flat(each) for each in KINDS[op].of_norm(norm)]
    order = _fp4_order if op == "nvfp4" else _fp8_order
    codes = (order(got[0]) - order(want[0])).abs().view(-1)
    if len(want) == 1:
        return codes, codes[:0]
    if want[1].dtype == torch.float32:
        ulps = [each.view(torch.int32).long() for each in (got[1], want[1])]
        return codes, (ulps[0] - ulps[1]).abs()
    of_scales = (got[1].view(torch.uint8).short() - want[1].view(torch.uint8).short()).abs()
    return codes, of_scales if op == "group_fp8_packed" else of_scales[_stored(op, norm)]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements, row by row; of one column too, whose stride says nothing and may be any."""
    return tensor.contiguous().view(-1)


def _stored(op: str, norm: torch.Tensor) -> torch.Tensor:
    """Which bytes of scales in tiles are some block's: what pads them is not looked at, as not everybody writes it."""
    block = scales.NVFP4_BLOCK if op == "nvfp4" else scales.MX_BLOCK
    blocks = torch.ones(norm.shape[0], norm.shape[1] // block, dtype=torch.uint8, device=norm.device)
    return swizzled(blocks).bool()


def _fp8_order(codes: torch.Tensor) -> torch.Tensor:
    """Numbers in the order of e4m3's values, neighbours one apart; -0 and 0 are two."""
    bits = codes.view(torch.uint8).short()
    magnitude = bits & 0x7F
    magnitude = torch.where(magnitude == 0x7F, _NAN, magnitude)
    return torch.where(bits > 0x7F, -1 - magnitude, magnitude)


def _fp4_order(codes: torch.Tensor) -> torch.Tensor:
    """The same of e2m1's, two in a byte."""
    bits = torch.stack((codes & 15, codes >> 4)).short()
    magnitude = bits & 7
    return torch.where(bits > 7, -1 - magnitude, magnitude)
