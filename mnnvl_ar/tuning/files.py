"""Tables as files, one a class of machine: mnnvl_ar/tuning/<machine class>.json, which `make tune` writes.

    {"machine": "NVIDIA H200", "tp": {
    "4": {"one_shot_bytes": 230000},
    "8": {"source_digest": "...", "entries": [
      {"row_bytes": 14336, "max_tokens": 4, "strategy": "one_shot", "cluster": 0, "max_ctas": 0, "batch": 0, "lag": 0,
       "us": 3.1}, ...]}}}

By world size either a crossover or entries; `Table` and `Entry` say what they mean. `machine`, `source_digest` (of the
sources that were timed) and `us` are for people.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from mnnvl_ar.errors import MnnvlArError
from mnnvl_ar.ops import Strategy

from .table import Entry, Table

FOLDER = Path(__file__).parent
NUMBERS = tuple(field.name for field in fields(Entry) if field.name != "strategy")
STRATEGIES = {"one_shot": Strategy.ONE_SHOT, "two_shot": Strategy.TWO_SHOT}
MOST = {"row_bytes": 32768, "cluster": 8}  # 32 bits for the others
AT_LEAST_1 = ("row_bytes", "max_tokens")


def machine_class(machine: str) -> str:
    """The name of a GPU (`torch.cuda.get_device_name`) as that of a file: "NVIDIA H200" -> "h200"."""
    return re.sub(r"[^a-z0-9]+", "", machine.replace("NVIDIA", "").lower())


def read(file: Path) -> dict[int, Table]:
    """The file's tables by world size. Raises `MnnvlArError` naming file, place, got and wanted."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise MnnvlArError(f"strategy table {file.name}: cannot be read: {error}") from error
    try:
        _check_keys("", content, {"machine", "tp"}, {"machine", "tp"})
        _check(isinstance(content["tp"], dict), "tp", content["tp"], "tables by world size")
        return {_world_size(tp): _table(f"tp {tp}", part, file.name) for tp, part in content["tp"].items()}
    except _Wrong as wrong:
        advice = "Run `make tune` to write it anew, or delete it to go by the cost model."
        raise MnnvlArError(f"strategy table {file.name}: {wrong}. {advice}") from None


class _Wrong(Exception):
    pass


def _check(right: bool, place: str, got: object, wanted: str) -> None:
    if not right:
        raise _Wrong(f"{place}: got {got!r}, wanted {wanted}")


def _check_keys(place: str, part: Any, needed: set[str], known: set[str]) -> None:
    _check(isinstance(part, dict), place or "content", part, "an object")
    _check(needed <= part.keys() <= known, f"{place} keys".strip(), sorted(part), ", ".join(sorted(needed)))


def _check_number(place: str, got: Any, least: int, most: int) -> None:
    _check(type(got) is int and least <= got <= most, place, got, f"a whole number from {least} to {most}")


def _world_size(tp: str) -> int:
    _check(tp.isdecimal() and int(tp) >= 1, "tp", tp, "a world size")
    return int(tp)


def _table(place: str, part: Any, source: str) -> Table:
    _check(isinstance(part, dict), place, part, "an object")
    if "one_shot_bytes" in part:
        _check_keys(place, part, {"one_shot_bytes"}, {"one_shot_bytes", "source_digest"})
        _check_number(f"{place}, one_shot_bytes", part["one_shot_bytes"], 0, 2**62)
        return Table(part["one_shot_bytes"], source=source)
    _check_keys(place, part, {"entries"}, {"entries", "source_digest"})
    got = part["entries"]
    _check(isinstance(got, list) and len(got) > 0, f"{place}, entries", got, "a list that is not empty")
    entries = tuple(_entry(f"{place}, entry {i}", entry) for i, entry in enumerate(got))
    for i, (before, entry) in enumerate(itertools.pairwise(entries), 1):
        sizes = [(e.row_bytes, e.max_tokens) for e in (before, entry)]
        _check(sizes[0] < sizes[1], f"{place}, entry {i}", sizes[1], f"row_bytes, max_tokens beyond {sizes[0]}")
    return Table(entries=entries, source=source)


def _entry(place: str, part: Any) -> Entry:
    needed = {*NUMBERS, "strategy"}
    _check_keys(place, part, needed, needed | {"us"})
    _check(part["strategy"] in STRATEGIES, f"{place}, strategy", part["strategy"], " or ".join(STRATEGIES))
    for name in NUMBERS:
        _check_number(f"{place}, {name}", part[name], int(name in AT_LEAST_1), MOST.get(name, 2**31 - 1))
    return Entry(strategy=STRATEGIES[part["strategy"]], **{name: part[name] for name in NUMBERS})
