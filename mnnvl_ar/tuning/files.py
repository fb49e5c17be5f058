"""Tables as files, one for each class of machine: mnnvl_ar/tuning/<class>.json, which `make tune` writes.

    {"machine": "NVIDIA H200", "tp": {
    "4": {"one_shot_bytes": 230000},
    "8": {"source_digest": "...", "entries": [
      {"row_bytes": 14336, "max_tokens": 4, "strategy": "one_shot", "cluster": 0, "max_ctas": 0, "batch": 0, "lag": 0,
       "pdl": "off", "us": 3.1}, ...]}}}

For each world size either a crossover or entries: `Table`, `Entry` and `LaunchShape` say what the figures mean; without
`pdl` it is off. `machine`, `source_digest` (of the sources that were timed) and `us` (a call's time) are for people.
"""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path
from typing import Any

from mnnvl_ar.ops import Pdl, Strategy

from . import checks
from .checks import check, check_keys, check_object, check_whole
from .table import Entry, LaunchShape, Table

FOLDER = Path(__file__).parent
SIZE = ("row_bytes", "max_tokens")
LAUNCH = tuple(field.name for field in fields(LaunchShape))
STRATEGIES = {"one_shot": Strategy.ONE_SHOT, "two_shot": Strategy.TWO_SHOT}
PDLS = {"off": Pdl.OFF, "late": Pdl.LATE, "early": Pdl.EARLY}
MOST = {"row_bytes": 32768, "cluster": 8}  # 32 bits for the others


def read(file: Path) -> dict[int, Table]:
    """The file's tables by world size. Raises `MnnvlArError` naming file, place, got and wanted."""

    def tables(content: Any) -> dict[int, Table]:
        check_keys("", content, {"machine", "tp"})
        check(isinstance(content["tp"], dict), "tp", content["tp"], "tables by world size")
        return {_world_size(tp): _table(f"tp {tp}", part, file.name) for tp, part in content["tp"].items()}

    advice = "Run `make tune` to write it anew, or delete it to go by the cost model."
    return checks.read("strategy table", file, tables, advice)


def _world_size(tp: str) -> int:
    check(tp.isdecimal() and int(tp) >= 1, "tp", tp, "a world size")
    return int(tp)


def _table(place: str, part: Any, source: str) -> Table:
    check_object(place, part)
    if "one_shot_bytes" in part:
        check_keys(place, part, {"one_shot_bytes"}, {"source_digest"})
        check_whole(f"{place}, one_shot_bytes", part["one_shot_bytes"], 0, 2**62)
        return Table(part["one_shot_bytes"], source=source)
    check_keys(place, part, {"entries"}, {"source_digest"})
    got = part["entries"]
    check(isinstance(got, list) and len(got) > 0, f"{place}, entries", got, "a list that is not empty")
    entries = tuple(_entry(f"{place}, entry {i}", entry) for i, entry in enumerate(got))
    for i, (before, entry) in enumerate(itertools.pairwise(entries), 1):
        sizes = [(e.row_bytes, e.max_tokens) for e in (before, entry)]
        check(sizes[0] < sizes[1], f"{place}, entry {i}", sizes[1], f"row_bytes, max_tokens beyond {sizes[0]}")
    return Table(entries=entries, source=source)


def _entry(place: str, part: Any) -> Entry:
    check_keys(place, part, {*SIZE, "strategy", *LAUNCH}, {"us", "pdl"})
    check(part["strategy"] in list(STRATEGIES), f"{place}, strategy", part["strategy"], " or ".join(STRATEGIES))
    pdl = part.get("pdl", "off")
    check(pdl in list(PDLS), f"{place}, pdl", pdl, " or ".join(PDLS))
    for name in (*SIZE, *LAUNCH):
        check_whole(f"{place}, {name}", part[name], int(name in SIZE), MOST.get(name, 2**31 - 1))
    launch = LaunchShape(**{name: part[name] for name in LAUNCH})
    return Entry(part["row_bytes"], part["max_tokens"], STRATEGIES[part["strategy"]], launch, PDLS[pdl])
