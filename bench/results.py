"""The record of a run: one JSON file a machine.

    {"machine": "8 x NVIDIA H200", "source_digest": "...", "rows": [
        {"op", "variant", "tp", "tokens", "hidden", "dtype", "p50_us", "p99_us", "floor_us", "ok", ...}]}

`variant` is "mnnvl_ar", forced strategies as "mnnvl_ar/one_shot", a peer's name, or "yardstick/..." for what is no
all-reduce (peers/yardsticks.py). `ok`: the buffers that were timed held the right answer. `floor_us` is null for a
class of machine without one (floor.py). More keys a row: mode, l2, context, skew_us, calls, rounds, strategy, pdl,
transport, and `error` where ok is false; `low_us` and `high_us`, between which the median of all rounds that could be
is with 95 %; `base_us`, what was taken off (contexts.py), 0 in a bare chain; `gemms`, of that context, the kernels
around the calls and how each follows the one before (launched.py); `codes_off` and `scales_off`, of a peer that fuses
a quantised output, the shares that are not the reference's of the peer's own norm, on the first rank (codes.py). Rows
from before there were contexts have none of these keys, and are of a chain. What could not run and why, and the cells
that the time was too short for, are in a text file beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import whole
from bench.cells import Cell
from tools import sources

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
KEYS = ("op", "variant", "tp", "tokens", "hidden", "dtype", "p50_us", "p99_us", "floor_us", "ok")
OURS, YARDSTICK = "mnnvl_ar", "yardstick"
Row = dict[str, Any]


class Results:
    """Rows so far, written to `file` after every cell so that a run cut short still counts."""

    def __init__(self, machine: str, digest: str, file: Path | None) -> None:
        self.machine, self.digest, self.file = machine, digest, file
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}
        self.not_run: list[str] = []

    def resume(self, file: Path) -> None:
        """Takes over the rows of the same machine and sources, so that their cells need not run again."""
        if not file.exists():
            return
        before = json.loads(file.read_text())
        if (before["machine"], before["source_digest"]) == (self.machine, self.digest):
            self.rows = before["rows"]

    def done(self) -> set[tuple[Any, ...]]:
        return {cell_key(row) for row in self.rows}

    def save(self) -> None:
        if self.file is None:
            return
        head = f'{{"machine": {json.dumps(self.machine)}, "source_digest": "{self.digest}", "rows": ['
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        whole.write(self.file, f"{head}\n{rows}\n]}}\n")
        notes = self.file.with_suffix(".skipped.txt")
        notes.unlink(missing_ok=True)
        if lines := self.notes():
            notes.write_text("\n".join(lines) + "\n")

    def notes(self) -> list[str]:
        """What is not in the rows, and why."""
        skipped = [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return skipped + [f"not run for want of time: {cell}" for cell in self.not_run]


def cell_key(row: Row | Cell) -> tuple[Any, ...]:
    values = row.key() if isinstance(row, Cell) else row
    return tuple(values.get(name, usual) for name, usual in _CELL.items())


_CELL = {"op": None, "tp": None, "tokens": None, "hidden": None, "dtype": None}
_USUAL = {"mode": "graph", "l2": "warm", "context": "chain", "skew_us": 0.0}
_CELL |= _USUAL


def is_usual(row: Row) -> bool:
    """Warm, in a graph, in a chain, all ranks at once."""
    return all(row.get(name, usual) == usual for name, usual in _USUAL.items())


def is_ours(variant: str) -> bool:
    return variant == OURS or variant.startswith(OURS + "/")


def is_peer(variant: str) -> bool:
    return not is_ours(variant) and not variant.startswith(YARDSTICK + "/")


def by_cell(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of each cell, in the order that they were measured in."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault(cell_key(row), []).append(row)
    return cells


def ours_and_best(rows: Iterable[Row]) -> tuple[Row | None, Row | None]:
    """(our default, the quickest right peer) of one cell's rows."""
    ours = next((row for row in rows if row["variant"] == OURS), None)
    peers = [row for row in rows if is_peer(row["variant"]) and row["ok"]]
    return ours, min(peers, key=lambda row: float(row["p50_us"]), default=None)


def source_digest() -> str:
    """Of the sources that a call's time rests on, as the GPU record has them: a result of other ones is stale."""
    return sources.digest(sources.in_rooms(sources.LIBRARY, sources.snapshot()))


def sources_told(run: dict[str, Any], today: str) -> str:
    """What a page says of a record's sources, where today's have the digest `today`."""
    age = "" if run["source_digest"] == today else ", **earlier than today's**"
    return f"Sources `{run['source_digest']}`{age}."


def machine_slug(machine: str) -> str:
    """A file name: "8 x NVIDIA H200" -> "h200x8"."""
    parts = []
    for part in machine.split(" + "):
        count, _, name = part.partition(" x ")
        word = name.replace("NVIDIA", "") if name else count
        parts.append(re.sub(r"[^a-z0-9]+", "", word.lower()) + (f"x{count}" if name else ""))
    return "_".join(parts)
