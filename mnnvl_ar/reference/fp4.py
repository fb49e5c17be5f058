"""Quantised to e2m1 with an e4m3 scale a block: NVFP4, a function of `norm` as stored (docs/numerics.md, step 6)."""

from __future__ import annotations

import torch

from mnnvl_ar.reference.codes import E4M3_NAN, e2m1, e4m3
from mnnvl_ar.reference.fp8 import block_layouts, elements, most

BLOCK = 16


def nvfp4(
    norm: torch.Tensor, global_scale: torch.Tensor | float, layout: str = "swizzled"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(codes, scales)` of blocks of 16 neighbouring elements: element = code * scale / global_scale, about.

    A block's scale is e4m3(global_scale * (its largest magnitude * fl(1 / 6))), each product rounded to fp32, and
    codes are e2m1(norm * (1 / (scale * (1 / global_scale)))), each step likewise; of a scale of 0 they are e2m1(norm *
    0). A NaN, and a global scale so large or small that a scale / global_scale has no reciprocal, makes the scale NaN
    (0x7F): e2m1 has no NaN, and codes under it, +6, say nothing.

    norm:         bf16 or fp16 [..., hidden], M rows, hidden a multiple of 16
    global_scale: fp32, of one element: multiplied in, unlike `static_fp8`'s; usually 448 * 6 / largest of the tensor
    layout:       of scales, as in `mxfp8`, with hidden / 16 columns and as float8_e4m3fn
    codes:        uint8 [..., hidden / 2], element 2i in the low half of byte i

    Errors: `ValueError` as in `mxfp8`.
    Source: the published references of vLLM and torchao; kernels of others use reciprocals that are approximate.
    """
    x = elements(norm, BLOCK)
    one, g = torch.ones(()), torch.as_tensor(global_scale, dtype=torch.float32).reshape(())
    scale = e4m3(g * (most(x) * torch.tensor(1 / 6, dtype=torch.float32)))
    value = scale.float()
    factor = one / (value * (one / g))
    lost = (value != 0) & ~(factor.isfinite() & (factor != 0))
    scale = torch.where(lost, E4M3_NAN, scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    factor = torch.where(lost, torch.nan, torch.where(value == 0, 0.0, factor))
    code = e2m1(x * factor.unsqueeze(-1)).view(*norm.shape[:-1], norm.shape[-1] // 2, 2)
    laid_out = block_layouts(scale.view(torch.uint8), layout)
    return code[..., 0] | code[..., 1] << 4, laid_out.view(torch.float8_e4m3fn)
