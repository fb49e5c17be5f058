"""Where scales stand in memory, as their consumers read them. Every byte of a result is defined: padding is 0."""

from __future__ import annotations

import torch


def align_up(value: int, to: int) -> int:
    return -(-value // to) * to


def column_major(scales: torch.Tensor, stride: int) -> torch.Tensor:
    """[rows, columns] with strides (1, stride): the same values, columns `stride` elements apart. The storage ends
    with the last row of the last column; what pads the others is 0."""
    rows, columns = scales.shape
    size = (columns - 1) * stride + rows if rows and columns else 0
    storage = torch.zeros(size, dtype=scales.dtype)
    result = storage.as_strided((rows, columns), (1, stride))
    result.copy_(scales)
    return result


def tma_aligned(scales: torch.Tensor) -> torch.Tensor:
    """Column-major with columns a multiple of 16 bytes apart, of 4-byte scales, as TMA needs it."""
    return column_major(scales, align_up(scales.shape[0], 4))


def packed(scales: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, groups] -> int32 [rows, ceil(groups / 4)], TMA-aligned: group 4i + j is byte j, from the lowest, of
    word i; bytes behind the last group are 0."""
    padded = torch.nn.functional.pad(scales, (0, -scales.shape[-1] % 4)).to(torch.int32).unflatten(-1, (-1, 4))
    words = padded[..., 0] | padded[..., 1] << 8 | padded[..., 2] << 16 | padded[..., 3] << 24
    return tma_aligned(words)


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns] -> flat uint8 of align(rows, 128) * align(columns, 4), in the order of cuBLASLt's and
    CUTLASS's scale factors: tiles of 128 rows by 4 columns, row by row; in a tile rows m, m + 32, m + 64, m + 96 stand
    together."""
    rows, columns = scales.shape
    padded = torch.nn.functional.pad(scales, (0, -columns % 4, 0, -rows % 128))
    tiles = padded.view(-1, 4, 32, padded.shape[1] // 4, 4)  # tile row, quarter, m, tile column, column
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)


def linear(scales: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns] -> flat, row by row, without padding."""
    return scales.reshape(-1)
