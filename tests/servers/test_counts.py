"""Calls counted from the workers' files, as `mnnvl_ar.compat.counted` writes them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from servers import counts


def write(folder: Path, pid: int, rank: int, calls: int, when: float, made: dict[str, int] | None = None) -> None:
    told: dict[str, Any] = {"pid": pid, "rank": rank, "world_size": 2, "when": when, "made": made or {"0": 3, "1": 40}}
    told["workspaces"] = [{"handle": 1, "calls": calls, "nbytes": 1000}, {"handle": 2, "calls": 5, "nbytes": 24}]
    (folder / f"{pid}.json").write_text(json.dumps(told))


def test_the_rank_with_fewest_counts(tmp_path: Path) -> None:
    for pid, rank, calls in ((11, 1, 100), (12, 0, 90)):
        write(tmp_path, pid, rank, calls, 50.0)
    before = counts.read(tmp_path)
    assert counts.total(before) == [95, 105]
    write(tmp_path, 11, 1, 160, 60.0)
    write(tmp_path, 12, 0, 130, 60.0, {"0": 9, "1": 7})
    after = counts.read(tmp_path)
    assert counts.served(before, after) == 40
    assert counts.normed(after) == 7
    assert counts.made(after) == {"0": 9, "1": 7}
    assert counts.nbytes(after) == 1024


def test_a_worker_that_says_nothing_has_served_nothing(tmp_path: Path) -> None:
    write(tmp_path, 11, 1, 100, 50.0)
    before = counts.read(tmp_path)
    write(tmp_path, 12, 0, 90, 50.0)
    assert counts.served(before, counts.read(tmp_path)) == 0
    assert counts.served([], []) == counts.normed([]) == counts.nbytes([]) == 0
    write(tmp_path, 11, 1, 100, 50.0, {"0": 4})
    assert counts.normed(counts.read(tmp_path)) == 0


def test_it_waits_for_what_is_new_but_not_for_ever(tmp_path: Path) -> None:
    write(tmp_path, 11, 1, 100, time.time())
    assert counts.settled(tmp_path, time.time() - 60)
    assert counts.settled(tmp_path, time.time() + 3600, patience=0.3)
    assert counts.settled(tmp_path / "none", 0.0, patience=0.3) == []
