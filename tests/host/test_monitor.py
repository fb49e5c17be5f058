"""The monitor's thread: where there is no room for it, and where a workspace goes in the middle of a look."""

from __future__ import annotations

import threading
import time
from typing import Any
from unittest import mock

import pytest
import torch

from common.ranks import Rank, RankPool
from mnnvl_ar.memory.lifeline import Lifeline
from mnnvl_ar.monitor import Monitor


class Owner:
    on_fault = None


class Nobody:
    """A lifeline by which nothing comes."""

    has_left = False

    def look(self) -> list[Any]:
        return []


@pytest.fixture
def lifeline() -> Lifeline:
    return Nobody()  # type: ignore[return-value]


def no_room(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_without_room_for_a_thread_it_says_so_and_the_next_one_starts_it(
    lifeline: Lifeline, caplog: pytest.LogCaptureFixture
) -> None:
    monitor, owners = Monitor(), (Owner(), Owner())
    with mock.patch.object(threading.Thread, "start", no_room):
        with pytest.raises(RuntimeError, match="can't start"):
            monitor.start()
        monitor.watch(-1, owners[0], lifeline)
    assert "nobody watches workspace -1 until another one is made" in caplog.text
    assert monitor._thread is None
    with mock.patch("mnnvl_ar.monitor.ops"):
        monitor.watch(-2, owners[1], lifeline)
        assert monitor._thread is not None
        assert monitor._thread.is_alive()
        monitor.end()


def test_a_workspace_may_go_in_any_thread_also_in_one_that_holds_the_lock(lifeline: Lifeline) -> None:
    """As where collecting garbage frees the last that holds one."""
    monitor, owner = Monitor(), Owner()
    with mock.patch.object(monitor, "start"):
        monitor.watch(-1, owner, lifeline)
    ended = threading.Event()

    def inside() -> None:
        with monitor._lock:
            monitor.forget(-1)
        ended.set()

    threading.Thread(target=inside, daemon=True).start()
    assert ended.wait(20.0)


def make(rank: Rank, fails: int) -> tuple[str, str]:
    """On rank `fails` there is no room for the monitor's thread: what each rank is told, and whether it works later."""
    import mnnvl_ar
    from mnnvl_ar import monitor

    def start(thread: threading.Thread) -> None:
        if rank.rank == fails and "monitor" in thread.name:
            raise RuntimeError("can't start new thread")
        begin(thread)

    begin, group = threading.Thread.start, rank.join()
    arguments = {"max_tokens": 4, "hidden": 64, "dtype": torch.bfloat16, "device": "cpu"}
    with mock.patch.object(threading.Thread, "start", start), pytest.raises(mnnvl_ar.BringUpError) as caught:
        mnnvl_ar.Workspace(group, **arguments)
    assert monitor._monitor._thread is None, "one that was started for nothing has ended"
    with mnnvl_ar.Workspace(group, **arguments) as workspace:
        x = torch.ones(1, 64, dtype=torch.bfloat16)
        return str(caught.value), str(mnnvl_ar.ops.all_reduce(x, workspace.handle)[0, 0].item())


def test_no_room_on_one_rank_is_every_ranks_error() -> None:
    with RankPool(2) as pool:
        for told, works in pool.run(make, 1):
            assert "rank 1 at step 'ready'" in told
            assert "can't start new thread" in told
            assert works == "2.0"


def blocks(rank: Rank) -> float:
    """A checkpoint's `forget` while `on_fault` hangs: seconds."""
    from mnnvl_ar import monitor

    monitor.PATIENCE = 0.3
    held = threading.Event()
    thread = threading.Thread(target=held.wait, args=(20.0,), daemon=True)
    thread.start()
    watched = monitor.Monitor()
    watched._thread = thread
    began = time.monotonic()
    monitor.await_end(watched.forget(-1))
    held.set()
    return time.monotonic() - began


def test_a_checkpoint_does_not_wait_for_an_on_fault_that_hangs() -> None:
    with RankPool(1) as pool:
        (seconds,) = pool.run(blocks)
    assert 0.2 < seconds < 10.0
