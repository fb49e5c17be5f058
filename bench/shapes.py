"""Launch shapes: which are tried for a cell, and how the quickest become a table (mnnvl_ar/tuning/files.py has the
format)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from bench.cells import Cell

MAX_CLUSTER, MOST_WARPS = 8, 14  # CTAs that share a row, and their warps with rows: csrc/cuda/row.cuh
GRID_FILLS = 16  # tokens from which rows compete for the device
NOISE = 1.03  # a shape must be this much quicker than the neighbour's to be worth another entry


@dataclass(frozen=True)
class Shape:
    strategy: str
    cluster: int = 0
    max_ctas: int = 0
    batch: int = 0
    lag: int = 0


def most_one_shot_bytes(tp: int) -> int:
    """Larger messages are never one-shot's. Two ranks send as much either way."""
    return 2 << 20 if tp > 2 else 1 << 30


def clusters(row_bytes: int) -> list[int]:
    """The clusters that differ in what is launched, narrowest first: `plan` (csrc/cuda/launch.cu) makes one of these of
    any other, as no CTA holds more than MOST_WARPS groups of 32 vectors, and none is launched to hold nothing."""
    groups = _divide_up(row_bytes, 32 * 16)
    narrowest = _divide_up(groups, MOST_WARPS)
    asked = {max(narrowest, min(cluster, groups)) for cluster in range(1, MAX_CLUSTER + 1)}
    return sorted({_divide_up(groups, _divide_up(groups, cluster)) for cluster in asked})


def shapes(cell: Cell, processors: int) -> Iterator[Shape]:
    """What may be quick for `cell`, at most 22; the library's own choice of each strategy comes first. processors: SMs
    of the device, or 0 to bound no grid."""
    half = processors // 2
    widths = clusters(cell.nbytes // cell.tokens)
    strategies = ("one_shot", "two_shot") if cell.nbytes <= most_one_shot_bytes(cell.tp) else ("two_shot",)
    for strategy in strategies:
        yield Shape(strategy)
        two_shot = strategy == "two_shot"
        if cell.tokens < GRID_FILLS:  # each row has a cluster to itself, however wide
            yield from (Shape(strategy, cluster, batch=int(two_shot)) for cluster in widths)
            continue
        if half:
            yield Shape(strategy, max_ctas=half)
        if not two_shot:
            yield from (Shape(strategy, cluster) for cluster in widths)
            if half and cell.tokens >= 128:  # rows queue up, and fewer that are on their way at once can be quicker
                yield from (Shape(strategy, cluster, 2 * processors) for cluster in widths[:3])
        elif cell.tokens < 128:
            # The library's own takes the widest cluster that leaves room for all rows; what else may win is narrower.
            yield from (Shape(strategy, cluster, batch=batch) for cluster in widths[:3] for batch in (1, 2, 4))
        else:  # batches queue up: one row at once lost by far (docs/performance.md), and lag has an effect
            yield from (Shape(strategy, cluster, batch=batch) for cluster in widths[:2] for batch in (2, 4))
            yield from (
                Shape(strategy, lag=2),
                Shape(strategy, widths[0], batch=4, lag=2),
                Shape(strategy, widths[0], batch=8),
            )
            if half:
                yield from (Shape(strategy, widths[0], half, batch) for batch in (2, 4))


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


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
