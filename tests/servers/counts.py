"""The calls that workers have served, from the files of MNNVL_AR_CALLS (`mnnvl_ar.compat.counted`)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

PATIENCE = 15.0  # seconds for files that are written once a second


def read(folder: Path) -> list[dict[str, Any]]:
    """Of each worker, by rank."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda each: (each["rank"], each["pid"]))


def settled(folder: Path, after: float, patience: float = PATIENCE) -> list[dict[str, Any]]:
    """The same, each from after the Unix time `after`, or what there is when patience ends."""
    end = time.monotonic() + patience
    while True:
        told = read(folder)
        if (told and all(each["when"] > after for each in told)) or time.monotonic() > end:
            return told
        time.sleep(0.1)


def total(told: list[dict[str, Any]]) -> list[int]:
    """Calls of each rank, all its workspaces together."""
    return [sum(each["calls"] for each in worker["workspaces"]) for worker in told]


def served(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> int:
    """Calls between two looks, on the rank that had fewest; 0 if a worker did not say."""
    first, second = total(before), total(after)
    if len(second) == 0 or len(first) != len(second):
        return 0
    return min(b - a for a, b in zip(first, second, strict=True))


def normed(told: list[dict[str, Any]]) -> int:
    """Calls that Python made with the norm fused, on the rank with fewest; captured ones once."""
    return min((sum(n for pattern, n in worker["made"].items() if pattern != "0") for worker in told), default=0)


def made(told: list[dict[str, Any]]) -> dict[str, int]:
    """Calls that Python made on the first rank, by pattern."""
    return dict(told[0]["made"]) if told else {}


def nbytes(told: list[dict[str, Any]]) -> int:
    """Of the largest worker's workspaces."""
    return max((sum(each["nbytes"] for each in worker["workspaces"]) for worker in told), default=0)
