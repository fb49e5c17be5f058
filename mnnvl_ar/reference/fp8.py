"""Quantised to e4m3 with scales of several kinds, each a function of `norm` as stored (docs/numerics.md, step 6).

In all of them: norm is bf16 or fp16 [..., hidden]; its leading dimensions together are M rows. A NaN makes its element
NaN; if a scale depends on it, the scale and all that share it are NaN. Codes are float8_e4m3fn in the shape of norm.
Errors: `ValueError` for a norm of another dtype, and a hidden that is no multiple of what shares a scale.
Source: the formulas of FlashInfer's fused kernels and of vLLM's quantising ops, rounded as IEEE 754 says.
"""

from __future__ import annotations

import torch

from mnnvl_ar.reference.codes import E8M0_NAN, e4m3, e8m0_up, exponent_up, power_of_two
from mnnvl_ar.reference.layouts import column_major, linear, packed, swizzled, tma_aligned

GROUP = 128  # elements that share a scale of per_token_group_fp8
MX_BLOCK = 32


def elements(norm: torch.Tensor, block: int = 1) -> torch.Tensor:
    """norm as fp32 [M, hidden / block, block]; exact."""
    if norm.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"norm: is {norm.dtype}, wanted torch.bfloat16 or torch.float16")
    if norm.shape[-1] % block:
        raise ValueError(f"norm: rows of {norm.shape[-1]} elements, wanted a multiple of {block}")
    rows = norm.shape[:-1].numel()
    return norm.float().reshape(rows, norm.shape[-1] // block, block)


def most(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of the last dimension, NaN if there is one."""
    return x.abs().amax(-1)  # amax passes NaN on


def over_448(x: torch.Tensor) -> torch.Tensor:
    """x / 448, rounded. Not by a scalar, which some of PyTorch's kernels would turn into its reciprocal."""
    return x / torch.full_like(x, 448.0)


def static_fp8(norm: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Codes of norm * (1 / scale), the reciprocal and the product rounded to fp32: element = code * scale, about.

    scale: fp32, of one element; any value. 0 has the reciprocal infinity: zeros become NaN, all else +-448
    """
    factor = torch.ones(()) / torch.as_tensor(scale, dtype=torch.float32).reshape(())
    return e4m3(elements(norm) * factor).view(norm.shape)


def per_token_fp8(norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(codes, scales)`: codes of norm / scale; scales fp32 [M, 1], the row's largest magnitude / 448, but no less than
    1 / (448 * 512): element = code * scale, about. A row with an infinity has the scale infinity: 0, NaN for itself.
    """
    x = elements(norm).squeeze(-1)
    least = torch.tensor(1 / (448 * 512), dtype=torch.float32)
    scale = torch.maximum(over_448(most(x)), least).unsqueeze(-1)
    return e4m3(x / scale).view(norm.shape), scale


def per_token_group_fp8(
    norm: torch.Tensor, scales: str = "fp32", layout: str = "row_major"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(codes, scales)` of groups of 128 neighbouring elements: codes of norm / scale; element = code * scale, about.
    A group's scale is its largest magnitude, but no less than 1e-10, / 448.

    scales: "fp32"; "power_of_two", up to one, also as fp32; "ue8m0", the same as exponents biased by 127, packed in
            fours. A group with an infinity: the scale infinity, of ue8m0 0xFF, which is NaN
    layout: of [M, G] fp32 scales, G = hidden / 128: "row_major"; "column_major", strides (1, M); "tma_aligned",
            strides (1, M up to a multiple of 4), the padding 0. ue8m0 has one: int32 [M, ceil(G / 4)], tma_aligned

    `ValueError` too for kinds and layouts that are not these.
    """
    if scales not in ("fp32", "power_of_two", "ue8m0"):
        raise ValueError(f"scales: is {scales!r}, wanted fp32, power_of_two or ue8m0")
    if layout not in ("row_major", "column_major", "tma_aligned"):
        raise ValueError(f"layout: is {layout!r}, wanted row_major, column_major or tma_aligned")
    if scales == "ue8m0" and layout != "tma_aligned":
        raise ValueError(f"layout: is {layout!r}, wanted tma_aligned, the only one of ue8m0 scales")
    x = elements(norm, GROUP)
    scale = over_448(torch.maximum(most(x), torch.tensor(1e-10)))
    if scales != "fp32":
        scale = torch.maximum(scale, torch.tensor(1e-10))
        finite = scale.isfinite()
        exponent = exponent_up(torch.where(finite, scale, 1.0))
        scale = torch.where(finite, power_of_two(exponent), scale)
    codes = e4m3(x / scale.unsqueeze(-1)).view(norm.shape)
    if scales == "ue8m0":
        return codes, packed(torch.where(finite, exponent + 127, E8M0_NAN).to(torch.uint8))
    return codes, group_layouts(scale, layout)


def group_layouts(scale: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "row_major":
        return scale
    return tma_aligned(scale) if layout == "tma_aligned" else column_major(scale, scale.shape[0])


def mxfp8(norm: torch.Tensor, layout: str = "swizzled") -> tuple[torch.Tensor, torch.Tensor]:
    """`(codes, scales)` of blocks of 32 neighbouring elements: element = code * 2^(scale - 127), about. A block's scale
    is the exponent, biased by 127, of the least power of two that is no smaller than its largest magnitude * fl(1 /
    448); 254 at most, infinity's; 0xFF for NaN. Codes of norm * 2^(127 - scale), but of norm * 0 for 0 and 254.

    layout: "swizzled", flat uint8, align(M, 128) * align(hidden / 32, 4) bytes in tiles of 128 by 4, the padding 0;
            "linear", flat uint8, M * hidden / 32. `ValueError` for others
    """
    x = elements(norm, MX_BLOCK)
    scale = e8m0_up(most(x) * torch.tensor(1 / 448, dtype=torch.float32))
    plain = (scale > 0) & (scale < 254)
    factor = torch.where(plain, power_of_two(127 - torch.where(plain, scale, 127).to(torch.int32)), 0.0)
    factor = torch.where(scale == E8M0_NAN, torch.nan, factor)
    return e4m3(x * factor.unsqueeze(-1)).view(norm.shape), block_layouts(scale, layout)


def block_layouts(scale: torch.Tensor, layout: str) -> torch.Tensor:
    """[M, blocks] of one byte each, laid out."""
    if layout not in ("swizzled", "linear"):
        raise ValueError(f"layout: is {layout!r}, wanted swizzled or linear")
    return swizzled(scale) if layout == "swizzled" else linear(scale)
