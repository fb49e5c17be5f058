"""Strategies and launch shapes: which are tried for a cell, and how the quickest become a table (its format is that of
mnnvl_ar/tuning/files.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.cells import Cell
from mnnvl_ar.tuning import LaunchShape

MAX_CLUSTER, MOST_WARPS = 8, 14  # CTAs that share a row, and their warps with rows: csrc/launch/limits.h
MOST_ROW_WARPS = 30  # where a cluster has one row, of two or four ranks
GRID_FILLS = 16  # tokens from which rows compete for the device
QUEUE_FILLS = 128  # tokens from which rows queue up
NOISE = 1.015  # a shape must be this much quicker than the neighbour's to be worth another entry


@dataclass(frozen=True)
class Shape:
    """A way to run a cell: a strategy and a PDL mode, as files name them, and a launch shape."""

    strategy: str
    launch: LaunchShape = field(default_factory=LaunchShape)
    pdl: str = "off"


def most_one_shot_bytes(tp: int) -> int:
    """Larger messages are never one-shot's. Two ranks send as much either way."""
    return 2 << 20 if tp > 2 else 1 << 30


def clusters(row_bytes: int, most_warps: int = MOST_WARPS) -> list[int]:
    """The clusters that differ in what is launched, narrowest first: csrc/launch/plan.cpp makes one of these of any
    other, as no CTA holds more than `most_warps` groups of 32 vectors, and none is launched to hold nothing."""
    groups = _divide_up(row_bytes, 32 * 16)
    narrowest = _divide_up(groups, most_warps)
    asked = {max(narrowest, min(cluster, groups)) for cluster in range(1, MAX_CLUSTER + 1)}
    return sorted({_divide_up(groups, _divide_up(groups, cluster)) for cluster in asked})


def shapes(cell: Cell, processors: int) -> Iterator[Shape]:
    """What may be quick for `cell`, at most 23; the library's own choice for each strategy comes first. Of two ranks
    one-shot alone. processors: SMs of the device, or 0 to bound no grid."""
    if cell.nbytes <= most_one_shot_bytes(cell.tp):
        yield from (Shape("one_shot", launch) for launch in _one_shot(cell, processors))
    if cell.tp > 2:  # decision 35
        yield from (Shape("two_shot", launch) for launch in _two_shot(cell, processors))


def _one_shot(cell: Cell, processors: int) -> Iterator[LaunchShape]:
    row_bytes, half = cell.nbytes // cell.tokens, processors // 2
    widths = clusters(row_bytes)
    yield LaunchShape()
    if half and cell.tokens >= GRID_FILLS:
        yield LaunchShape(max_ctas=half)
    a_row_each = cell.tp in (2, 4) and cell.tokens <= max(1, processors)
    yield from (LaunchShape(cluster) for cluster in (clusters(row_bytes, MOST_ROW_WARPS) if a_row_each else widths))
    if half and cell.tokens >= QUEUE_FILLS:  # rows queue up, and fewer that are on their way at once can be quicker
        yield from (LaunchShape(cluster, 2 * processors) for cluster in widths[:3])


def _two_shot(cell: Cell, processors: int) -> Iterator[LaunchShape]:
    widths, half = clusters(cell.nbytes // cell.tokens), processors // 2
    yield LaunchShape()
    if cell.tokens < GRID_FILLS:  # each row has a cluster to itself, however wide
        yield from (LaunchShape(cluster, batch=1) for cluster in widths)
        return
    if half:
        yield LaunchShape(max_ctas=half)
    if cell.tokens < QUEUE_FILLS:
        # The library's own takes the widest cluster that leaves room for all rows; what else may win is narrower.
        yield from (LaunchShape(cluster, batch=batch) for cluster in widths[:3] for batch in (1, 2, 4))
        return
    # Batches queue up: one row at once lost by far (docs/log/2026-11-21-first-kernels.md), and lag has an effect.
    yield from (LaunchShape(cluster, batch=batch) for cluster in widths[:2] for batch in (2, 4))
    yield LaunchShape(lag=2)
    yield LaunchShape(widths[0], batch=4, lag=2)
    yield LaunchShape(widths[0], batch=8)
    if half:
        yield from (LaunchShape(widths[0], half, batch) for batch in (2, 4))


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def table(best: dict[Cell, list[tuple[float, Shape]]]) -> list[dict[str, Any]]:
    """The entries of one group size. `best`: each cell's shapes by time. Neighbours in tokens share a shape where it is
    as quick as their own, up to noise."""
    entries: list[dict[str, Any]] = []
    for cell in sorted(best, key=lambda cell: (cell.hidden, cell.tokens)):
        row_bytes = cell.nbytes // cell.tokens
        us, shape = best[cell][0]
        last = entries[-1] if entries and entries[-1]["row_bytes"] == row_bytes else None
        if last is not None:
            launch = LaunchShape(**{name: last[name] for name in asdict(shape.launch)})
            same = Shape(last["strategy"], launch, last["pdl"])
            as_quick = next((t for t, s in best[cell] if s == same), None)
            if as_quick is not None and as_quick <= NOISE * us:
                last.update(max_tokens=cell.tokens, us=round(as_quick, 2))
                continue
        size = {"row_bytes": row_bytes, "max_tokens": cell.tokens}
        how = {"strategy": shape.strategy, **asdict(shape.launch), "pdl": shape.pdl}
        entries.append({**size, **how, "us": round(us, 2)})
    return entries
