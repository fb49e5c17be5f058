"""What strategy "auto" goes by in a group of one size on one class of machine: measured entries, or a crossover."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

from mnnvl_ar._library import ops
from mnnvl_ar.ops import Pdl, Strategy


@dataclass(frozen=True)
class LaunchShape:
    """How the kernel of a call is launched. 0 leaves a figure to the library.

    cluster:  CTAs that share a row, up to 8
    max_ctas: CTAs of a launch, at most
    batch:    of two-shot: rows that a cluster takes at once
    lag:      of two-shot: batches in flight between its two stages
    """

    cluster: int = 0
    max_ctas: int = 0
    batch: int = 0
    lag: int = 0


@dataclass(frozen=True)
class Entry:
    """The quickest way, as measured, for calls of up to `max_tokens` rows of `row_bytes` bytes. `pdl`: for calls and
    workspaces that leave it open."""

    row_bytes: int
    max_tokens: int
    strategy: Strategy
    launch: LaunchShape = LaunchShape()
    pdl: Pdl = Pdl.OFF


@dataclass(frozen=True)
class Table:
    """Either `entries`, in rising order of row_bytes and then max_tokens, or `one_shot_bytes`: the largest message, in
    bytes of one rank's [tokens, hidden], that goes by one-shot. `source` tells people where they are from.

    A call takes the entries of the nearest row size (of two as near, the smaller), and of these the first with tokens
    <= max_tokens, or the last if there is none. The look-up itself is in C++ (csrc/launch/strategy.h).
    """

    one_shot_bytes: int = 0
    entries: tuple[Entry, ...] = ()
    source: str = ""

    def columns(self) -> dict[str, Any]:
        """As the ops take it, by argument names: one_shot_bytes, and for each figure of the entries a list."""
        launches = [entry.launch for entry in self.entries]
        return {
            "table_one_shot_bytes": self.one_shot_bytes,
            "table_row_bytes": [entry.row_bytes for entry in self.entries],
            "table_max_tokens": [entry.max_tokens for entry in self.entries],
            "table_strategies": [int(entry.strategy) for entry in self.entries],
            "table_clusters": [launch.cluster for launch in launches],
            "table_max_ctas": [launch.max_ctas for launch in launches],
            "table_batches": [launch.batch for launch in launches],
            "table_lags": [launch.lag for launch in launches],
            "table_pdls": [int(entry.pdl) for entry in self.entries],
        }

    def slot_bytes(
        self,
        world_size: int,
        tokens: int,
        row_bytes: int,
        strategy: int = Strategy.AUTO,
        *,
        own_too: bool = True,
        max_bytes: int | None = None,
    ) -> int:
        """The size of a slot in which every call of up to `tokens` rows of `row_bytes` bytes is one launch, in a group
        of `world_size` ranks whose workspace has this table and `strategy`; less, where the block would have more than
        `max_bytes`: then calls run in pieces. `own_too`: there is room for a rank's own rows, which only a multicast
        brings. Raises `RuntimeError` where not even a row has room, naming the least that would do."""
        room = {"own_too": own_too, "max_bytes": max_bytes or 0}
        return int(ops._workspace_slot_bytes(world_size, tokens, row_bytes, int(strategy), **room, **self.columns()))

    def digest(self) -> str:
        """Of all that decides, so that ranks can be compared: alike where the columns are."""
        return f"{zlib.crc32(repr(self.columns()).encode()):08x}"

    def __str__(self) -> str:
        if self.entries:
            return f"by {len(self.entries)} measured sizes ({self.source})"
        return f"one_shot for messages up to {self.one_shot_bytes:,} bytes, two_shot above ({self.source})"
