"""Which ranks the GPU tests run on: virtual ones on the first GPU, and real ones, one a GPU."""

from __future__ import annotations

from typing import Any

from common.ranks import rank_pool

VIRTUAL, REAL = (2, 3, 4, 8, 9), (2, 4, 8)  # 3 and 9 are not unrolled; more than sixteen: test_many_ranks.py
_virtual: dict[int, Any] = {}


def ranks_of(kind: str, world_size: int) -> Any:
    """A pool of ranks to `run` functions on, kept for the session."""
    if kind == "real":
        return rank_pool(world_size, "cuda")
    from common.virtual_ranks import VirtualRanks

    if world_size not in _virtual:
        _virtual[world_size] = VirtualRanks(world_size)
    return _virtual[world_size]


def close_virtual() -> None:
    """Gives back what virtual ranks hold."""
    while _virtual:
        _virtual.popitem()[1].close()
