"""The doctor's own ranks, where there is no torchrun: one that dies or stands still, and how results become lines."""

import multiprocessing
import time

from mnnvl_ar.doctor import selftest

GOOD = {"ran": True, "ok": True, "latency_us": 1.0}


def test_a_process_that_dies() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    theirs.close()
    assert selftest._receive(ours, time.monotonic() + 60.0) == selftest.silent("its process died")


def test_a_process_that_stands_still() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    began = time.monotonic()
    assert selftest._receive(ours, began + 0.2) == selftest.silent("stopped or stuck")
    assert time.monotonic() - began < 10.0
    theirs.close()


def test_a_time_limit_ends_a_run() -> None:
    """Too short for processes even to start."""
    found = selftest.run(0, 0.1, limit=0.1)
    assert found["errors"] == ["ranks 0 and 1: said nothing more: stopped or stuck"]


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
