"""The doctor's own ranks, where there is no torchrun: one that dies or stands still, and how results become lines."""

import os
import time
from typing import Any

import pytest

from mnnvl_ar.doctor import selftest
from mnnvl_ar.ranks import Rank, RankPool

GOOD = {"ran": True, "ok": True, "latency_us": 1.0}


def die(rank: Any, *_: Any) -> dict[str, Any]:
    return os._exit(7) if rank.rank == 1 else GOOD


def stand_still(rank: Any, *_: Any) -> dict[str, Any]:
    return time.sleep(600) if rank.rank == 1 else GOOD  # type: ignore[return-value]


def test_a_process_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_serve", die)
    found = selftest.run(0, 0.1, limit=200.0)
    assert found["errors"] == ["rank 1: said nothing more: process ended with exit code 7"]
    assert found["by_rank"] == {0: GOOD, 1: selftest.silent("process ended with exit code 7")}


def well(*_: Any) -> dict[str, Any]:
    return GOOD


def test_starting_the_processes_is_no_part_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where PyTorch is read from a slow disk."""
    start, limit = RankPool.start, 10.0

    def slow(pool: RankPool, *what: Any) -> Any:
        time.sleep(limit + 1)
        return start(pool, *what)

    monkeypatch.setattr(selftest, "_serve", well)
    monkeypatch.setattr(RankPool, "start", slow)
    assert selftest.run(0, 0.1, limit)["ok"]


def nothing(rank: Rank) -> None: ...


def test_a_process_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    with RankPool(1) as pool:  # what ranks are forked from, which imports PyTorch first, runs then
        pool.run(nothing, timeout=200)
    monkeypatch.setattr(selftest, "_serve", stand_still)
    began = time.monotonic()
    found = selftest.run(0, 0.1, limit=10.0)
    assert time.monotonic() - began < 60.0
    (error,) = found["errors"]
    assert error.startswith("rank 1: said nothing more: still running after ")
    assert found["by_rank"][0] == GOOD


def test_a_time_limit_ends_a_run() -> None:
    """Too short for processes even to start."""
    found = selftest.run(0, 0.01, limit=0.01)
    assert found["errors"] == ["ranks 0 and 1: said nothing more: still running after 0 s"]


def test_summary() -> None:
    late, gone = selftest.failed("waited for rank 2"), selftest.silent("killed")
    assert selftest.summary({0: GOOD, 1: {**GOOD, "latency_us": 2.0}}) is GOOD
    found = selftest.summary({0: late, 1: late, 2: gone, 3: GOOD, 4: late})
    assert found["errors"] == ["rank 2: said nothing more: killed", "ranks 0, 1 and 4: waited for rank 2"]
    assert found["by_rank"][3] is GOOD
    assert not found["ok"]


def test_an_error_is_its_first_line() -> None:
    try:
        raise RuntimeError("what\nException raised from ...")
    except RuntimeError as error:
        found = selftest.failed(error)
    assert found["error"] == "what"
    assert "test_an_error_is_its_first_line" in found["traceback"]
    assert selftest.failed(KeyError())["error"] == "KeyError"
