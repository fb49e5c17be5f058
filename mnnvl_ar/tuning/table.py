"""What `auto` goes by in a group of one size on one class of machine: measured entries, or a crossover."""

from __future__ import annotations

import zlib
from dataclasses import astuple, dataclass

from mnnvl_ar.ops import Strategy


@dataclass(frozen=True)
class Entry:
    """The quickest way, as measured, for calls of up to `max_tokens` rows of `row_bytes` bytes.

    The rest is the launch shape, where 0 leaves a figure to the library: CTAs that hold a row together (cluster), an
    upper bound on CTAs, and of two-shot the rows that a cluster takes at once (batch) and the batches in flight between
    two stages (lag).
    """

    row_bytes: int
    max_tokens: int
    strategy: Strategy
    cluster: int = 0
    max_ctas: int = 0
    batch: int = 0
    lag: int = 0


@dataclass(frozen=True)
class Table:
    """Either `entries`, rising in row_bytes and then max_tokens, or `one_shot_bytes`: the largest message, in bytes of
    one rank's [tokens, hidden], that goes by one-shot. `source` says for people where they are from.

    A call takes the entries of the nearest row size (of two as near, the smaller), and of these the first with tokens
    <= max_tokens, or the last beyond. The look-up itself is in C++ (csrc/torch/strategy.h).
    """

    one_shot_bytes: int = 0
    entries: tuple[Entry, ...] = ()
    source: str = ""

    def flat(self) -> list[int]:
        """As the ops take it: one_shot_bytes, then seven numbers an entry."""
        return [self.one_shot_bytes, *(int(number) for entry in self.entries for number in astuple(entry))]

    def digest(self) -> str:
        """Of what decides, so that ranks can be compared."""
        return f"{zlib.crc32(repr(self.flat()).encode()):08x}"

    def __str__(self) -> str:
        if self.entries:
            return f"by {len(self.entries)} measured sizes ({self.source})"
        return f"one_shot for messages up to {self.one_shot_bytes:,} bytes, two_shot above ({self.source})"
