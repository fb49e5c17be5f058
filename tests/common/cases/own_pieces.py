"""Calls in pieces (tests/common/cases/pieces.py) where own rows come, too: by one-shot fewer rows go at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from common.cases import pieces, software


def bytes_with_own_rows(rank: Any, rows: int, strategy: int, row_bytes: int = pieces.ROW_BYTES) -> int:
    """As `pieces.bytes_for_rows`."""
    size, vectors = rank.world_size, row_bytes // 16
    a_row = vectors * size if strategy == 0 else size * -(-vectors // size) + vectors
    return int(16384 + 3 * rows * a_row * 16)


def counted_with_own_rows() -> Any:
    """For a process: virtual ranks are threads, which must not each exchange what all of them use."""
    return mock.patch.multiple(pieces, bytes_for_rows=bytes_with_own_rows, transport_of=lambda _: "auto")


def in_virtual_ranks(rank: Any, world_size: int, check: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """A check of `pieces`, as `software.in_virtual_ranks`."""
    with counted_with_own_rows():
        software.in_virtual_ranks(rank, world_size, check, *arguments, **named)


def by_software(rank: Any, check: Callable[..., Any], *arguments: Any) -> Any:
    """The same on real ranks, as `software.by_software`."""
    with counted_with_own_rows():
        return software.by_software(rank, check, *arguments)
