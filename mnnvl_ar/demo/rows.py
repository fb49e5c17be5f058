"""Rows of the kinds that have hung, or bent the results of, other all-reduce kernels: padding rows of captured graphs
hold any bits.

`hostile_rows` is deterministic: the same (seed, rank) gives the same bits in every process, so that each rank can
compute what all ranks together should answer.
"""

from __future__ import annotations

import functools
import math

import torch

# 32-bit words as a slot holds them. 16-bit dtypes see two elements in each, the first one in the low half.
_WORDS = {
    4: (
        0x80000000,  # -0.0, the sentinel itself
        0x80000001,  # smallest negative subnormal: a flushed compare takes it for -0.0
        0x807FFFFF,
        0x00000001,
        0x007FFFFF,
        0x80010000,
        0x00008000,
        0x00000000,
        0x7F800000,  # infinities
        0xFF800000,
        0x7FC00000,  # NaN
        0xFFFFFFFF,
        0x7F7FFFFF,  # largest
        0xFF7FFFFF,
    ),
    2: (
        0x80000000,  # +0, -0: the sentinel itself
        0x00008000,  # -0, +0
        0x80008000,
        0x80000001,  # subnormals beside zeros of either sign
        0x80010000,
        0x80018001,
        0x00010001,
        0x00000000,
    ),
}
_HALVES = {
    torch.bfloat16: (0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F7F, 0xFF7F, 0x007F, 0x807F),
    torch.float16: (0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x7BFF, 0xFBFF, 0x03FF, 0x83FF),
}


def _signed(words: tuple[int, ...], bits: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([word - (1 << bits) if word >> (bits - 1) else word for word in words], dtype=dtype)


@functools.cache
def _patterns(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words of any kind, those that are finite, and those that are small too, as int32."""
    words = list(_WORDS[dtype.itemsize])
    if dtype.itemsize == 2:
        words += [half | 0x3C00 << 16 for half in _HALVES[dtype]] + [half << 16 for half in _HALVES[dtype]]
    every = _signed(tuple(words), 32, torch.int32)
    largest = every.view(dtype).float().abs().unflatten(0, (len(words), -1)).amax(-1)  # NaN where one is
    return every, every[largest.isfinite()], every[largest <= 1]


def hostile_rows(
    tokens: int, hidden: int, dtype: torch.dtype, *, seed: int, rank: int, share: float = 0.05
) -> torch.Tensor:
    """[tokens, hidden] of `dtype` on the CPU: normal numbers, with `share` of the words replaced by words of the lists
    above.

    Row t is of kind (t + seed) % 8: 0 and 1 hold infinities and NaN too, 2 and 3 elements whose sum over ranks depends
    on the order of addition, 5 is nothing but zeros of both signs, 6 nothing but sentinels, 7 holds the largest
    numbers. Of 0, 1 and 7 the square sum is mostly NaN or infinite, and the norm NaN or 0; of 2, 3 and 4 it is neither.
    """
    generator = torch.Generator().manual_seed(1009 * seed + rank)
    kind = ((torch.arange(tokens) + seed) % 8).unsqueeze(-1)
    rows = torch.randn(tokens, hidden, generator=generator)
    # In fp32, (large + small) - large is not small + (large - large).
    large, small = (2.0**14, 1.5 * 2.0**-11) if dtype == torch.float16 else (2.0**30, 1.5)
    ordered = (torch.arange(hidden) % 16 == 5) & ((kind == 2) | (kind == 3))
    rows[ordered] = (large, small, -large)[rank % 3]
    rows = rows.to(dtype)
    if rows.numel() == 0:
        return rows
    words = rows.view(torch.int32)
    every, finite, modest = _patterns(dtype)
    count = max(4, math.ceil(words.shape[1] * share))
    place = torch.randint(words.shape[1], (tokens, count), generator=generator)
    wild = every[torch.randint(len(every), (tokens, count), generator=generator)]
    huge = finite[torch.randint(len(finite), (tokens, count), generator=generator)]
    tame = modest[torch.randint(len(modest), (tokens, count), generator=generator)]
    words.scatter_(1, place, torch.where(kind < 2, wild, torch.where(kind == 7, huge, tame)))
    zeros = _signed(
        (0x80000000, 0x00008000, 0x80008000, 0) if dtype.itemsize == 2 else (0x80000000, 0), 32, torch.int32
    )
    words.copy_(torch.where(kind == 5, zeros[torch.randint(len(zeros), words.shape, generator=generator)], words))
    words.copy_(torch.where(kind == 6, zeros[0], words))
    return rows
