"""Tensors for the scales of quantised outputs, in the layouts that their consumers read.

    scale = scales.per_token_group_fp8(tokens, hidden, GroupScales.UE8M0, device=x.device)
    ops.all_reduce_rms_norm_per_token_group_fp8_out(..., quant, scale, None, residual, handle, scales=GroupScales.UE8M0)

Every one is uninitialised, and a call writes every byte of it that its shape and strides span: what pads it is 0.
tokens: M rows, all leading dimensions of x together. Errors: `ValueError` for a hidden that is no multiple of what
shares a scale, and for a layout that the scales have not. Source: docs/numerics.md; csrc/protocol/scale_layout.h.
"""

from __future__ import annotations

from enum import IntEnum

import torch

GROUP, MX_BLOCK, NVFP4_BLOCK = 128, 32, 16  # elements that share a scale


class GroupScales(IntEnum):
    """How a scale of 128 elements is stored; codes are multiplied by it in each."""

    FP32 = 0
    POWER_OF_TWO = 1  # up to the next, as fp32
    UE8M0 = 2  # the same as exponents biased by 127, four to an int32, the first in the lowest byte


class GroupLayout(IntEnum):
    """Of [M, G] scales of groups. DEFAULT: ROW_MAJOR, and of UE8M0 TMA_ALIGNED, the only one that it has."""

    DEFAULT = -1
    ROW_MAJOR = 0
    COLUMN_MAJOR = 1  # strides (1, M)
    TMA_ALIGNED = 2  # strides (1, M up to a multiple of 4)


class BlockLayout(IntEnum):
    """Of scales of one byte; the numbers are FlashInfer's."""

    TILES_128X4 = 0  # as tensor cores read them: 128 rows by 4 columns, both padded
    LINEAR = 2  # row by row, without padding


def per_token_fp8(tokens: int, *, device: torch.device | str | None = None) -> torch.Tensor:
    """fp32 [M, 1]."""
    return torch.empty(tokens, 1, dtype=torch.float32, device=device)


def per_token_group_fp8(
    tokens: int,
    hidden: int,
    scales: int = GroupScales.FP32,
    layout: int = GroupLayout.DEFAULT,
    *,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """fp32 [M, G], G = hidden / 128, in a `GroupLayout`; of UE8M0 int32 [M, ceil(G / 4)]."""
    groups = _blocks(hidden, GROUP)
    for name, value, kinds in (("scales", scales, GroupScales), ("layout", layout, GroupLayout)):
        if value not in [*kinds]:
            raise ValueError(f"{name}: is {value}, wanted one of {', '.join(f'{k} ({k.name})' for k in kinds)}")
    is_packed = scales == GroupScales.UE8M0
    if is_packed and layout not in (GroupLayout.DEFAULT, GroupLayout.TMA_ALIGNED):
        raise ValueError(f"layout: is {layout}, wanted TMA_ALIGNED, the only one of UE8M0 scales")
    columns, dtype = (_align(groups, 4) // 4, torch.int32) if is_packed else (groups, torch.float32)
    if is_packed or layout == GroupLayout.TMA_ALIGNED:
        strides = (1, _align(tokens, 4))
    else:
        strides = (1, tokens) if layout == GroupLayout.COLUMN_MAJOR else (columns, 1)
    return torch.empty_strided((tokens, columns), strides, dtype=dtype, device=device)


def mxfp8(
    tokens: int, hidden: int, layout: int = BlockLayout.TILES_128X4, *, device: torch.device | str | None = None
) -> torch.Tensor:
    """Flat uint8, in a `BlockLayout`, of hidden / 32 columns: exponents biased by 127."""
    return torch.empty(_bytes(tokens, _blocks(hidden, MX_BLOCK), layout), dtype=torch.uint8, device=device)


def nvfp4(
    tokens: int, hidden: int, layout: int = BlockLayout.TILES_128X4, *, device: torch.device | str | None = None
) -> torch.Tensor:
    """Flat float8_e4m3fn, in a `BlockLayout`, of hidden / 16 columns."""
    return torch.empty(_bytes(tokens, _blocks(hidden, NVFP4_BLOCK), layout), dtype=torch.float8_e4m3fn, device=device)


def _blocks(hidden: int, block: int) -> int:
    if hidden % block:
        raise ValueError(f"hidden: is {hidden}, wanted a multiple of {block}")
    return hidden // block


def _bytes(rows: int, columns: int, layout: int) -> int:
    if layout not in (BlockLayout.TILES_128X4, BlockLayout.LINEAR):
        raise ValueError(f"layout: is {layout}, wanted {BlockLayout.TILES_128X4} or {BlockLayout.LINEAR}")
    return rows * columns if layout == BlockLayout.LINEAR else _align(rows, 128) * _align(columns, 4)


def _align(value: int, to: int) -> int:
    return (value + to - 1) // to * to
