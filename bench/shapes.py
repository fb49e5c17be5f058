"""Launch shapes: which are tried for a cell, and how the quickest become a table (mnnvl_ar/strategy/files.py has the
format)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from bench.cells import Cell

ONE_SHOT_BYTES = 2 << 20  # larger messages are never one-shot's
NOISE = 1.02  # a shape must be this much quicker than the neighbour's to be worth another entry


@dataclass(frozen=True)
class Shape:
    strategy: str
    cluster: int = 0
    max_ctas: int = 0
    batch: int = 0
    lag: int = 0


def shapes(cell: Cell) -> Iterator[Shape]:
    """What may be quick for `cell`; the library's own choice of each strategy comes first."""
    clusters = (0, 1, 2, 4, 8)
    if cell.nbytes <= ONE_SHOT_BYTES:
        for cluster in clusters:
            yield Shape("one_shot", cluster)
    for cluster in clusters:
        for batch in (0, 2, 4, 8):
            if batch > cell.tokens:
                continue
            for lag in (0, 2, 4):
                if lag and cell.tokens < 128:  # one batch a cluster: nothing to run behind
                    continue
                for max_ctas in (0, 64) if cell.tokens >= 128 else (0,):
                    yield Shape("two_shot", cluster, max_ctas, batch, lag)


def table(best: dict[Cell, list[tuple[float, Shape]]]) -> list[dict[str, Any]]:
    """Entries of one group size. `best`: of each cell, all shapes by time. Neighbours in tokens share a shape where it
    is as quick as theirs but for noise."""
    entries: list[dict[str, Any]] = []
    for cell in sorted(best, key=lambda cell: (cell.hidden, cell.tokens)):
        row_bytes = cell.nbytes // cell.tokens
        us, shape = best[cell][0]
        last = entries[-1] if entries and entries[-1]["row_bytes"] == row_bytes else None
        if last is not None:
            same = Shape(**{name: last[name] for name in asdict(shape)})
            as_quick = next((t for t, s in best[cell] if s == same), None)
            if as_quick is not None and as_quick <= NOISE * us:
                last.update(max_tokens=cell.tokens, us=round(as_quick, 2))
                continue
        entries.append({"row_bytes": row_bytes, "max_tokens": cell.tokens, **asdict(shape), "us": round(us, 2)})
    return entries
