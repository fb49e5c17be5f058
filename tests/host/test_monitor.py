"""The monitor's threads: where there is no room for one, where a workspace goes in the middle of a look, and where an
`on_fault` takes its time."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any
from unittest import mock

import pytest
import torch

import mnnvl_ar
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


def fail_alone(workspace: mnnvl_ar.Workspace) -> None:
    """One row, to which nobody adds: over at the deadline."""
    with pytest.raises(RuntimeError):
        mnnvl_ar.ops.all_reduce(torch.ones(1, 64, dtype=torch.bfloat16), workspace.handle)


def blocks(rank: Rank) -> float:
    """A checkpoint while `on_fault` hangs: seconds."""
    from mnnvl_ar import monitor

    join, told, held = monitor.join, threading.Event(), threading.Event()

    def on_fault(error: Exception) -> None:
        told.set()
        held.wait(20.0)

    workspace = rank.new_workspace(max_tokens=1, hidden=64, deadline=0.1, on_fault=on_fault)
    if rank.rank == 0:
        fail_alone(workspace)
    assert told.wait(20.0)
    began = time.monotonic()
    with mock.patch.object(monitor, "join", lambda threads: join(threads, 0.3)):
        workspace.checkpoint_prepare()
    took = time.monotonic() - began
    rank.barrier()
    held.set()
    until = time.monotonic() + 20.0
    while any("mnnvl_ar" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return took


def test_a_checkpoint_does_not_wait_for_an_on_fault_that_hangs() -> None:
    with RankPool(2) as pool:
        for seconds in pool.run(blocks):
            assert 0.2 < seconds < 10.0


def deaf(rank: Rank, beside: bool) -> float:
    """Rank 0 is in an `on_fault` of one workspace when rank 2 dies. The seconds until that is named on the other.
    beside: False as a control, where the monitor itself calls `on_fault`."""

    told, named = threading.Event(), list[float]()

    def on_fault(error: Exception) -> None:
        told.set()
        if rank.rank == 0:
            time.sleep(4.0)

    if not beside:
        begin = threading.Thread.start

        def start(thread: threading.Thread) -> None:
            if thread.name == "mnnvl_ar on_fault":
                raise RuntimeError("can't start new thread")
            begin(thread)

        threading.Thread.start = start  # type: ignore[method-assign]
    small: dict[str, Any] = {"max_tokens": 1, "hidden": 64, "deadline": 60.0}
    broken = rank.new_workspace(**small, on_fault=on_fault)
    other = rank.new_workspace(**small, on_fault=lambda error: named.append(time.monotonic()))
    rank.barrier()
    if rank.rank == 0:
        broken.deadline = 0.1
        fail_alone(broken)
    assert told.wait(20.0)
    rank.barrier()
    if rank.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    while not named:
        assert time.monotonic() < began + 20.0
        time.sleep(0.01)
    broken.close(force=True)
    other.close(force=True)
    return named[0] - began


@pytest.mark.parametrize("beside", [True, False], ids=["", "control"])
def test_who_dies_during_an_on_fault_is_named_at_once(beside: bool) -> None:
    """`on_fault` of rank 0, by which all hear, takes 4 s; the control without a thread of its own for it waits."""
    pool = RankPool(3)
    outcomes = pool.start(deaf, beside).outcomes(60)
    pool.discard()
    assert "exit code -9" in outcomes[2].value
    for ok, seconds in outcomes[:2]:
        assert ok, seconds
        assert (seconds < 2.0) == beside, seconds


def told_late(rank: Rank, anew: bool) -> int:
    """`on_fault` of rank 0 returns when `recover` has reset the workspace, and before it is watched again: how often
    that rank's stream is let go. anew: False as a control, where the old watch counts until the next."""
    import mnnvl_ar.workspace as module

    told, held, answers = threading.Event(), threading.Event(), list[int]()

    def on_fault(error: Exception) -> None:
        told.set()
        held.wait(20.0)

    def reset(handle: int) -> None:
        reset_it(handle)
        held.set()
        for thread in threading.enumerate():
            if thread.name == "mnnvl_ar on_fault":
                thread.join(20.0)

    workspace = rank.new_workspace(max_tokens=1, hidden=64, deadline=0.1, on_fault=on_fault)
    if rank.rank == 0:
        fail_alone(workspace)
    assert told.wait(20.0)
    reset_it = module.ops._workspace_reset
    ops = mock.Mock(wraps=module.ops, _workspace_reset=reset, _workspace_answer=answers.append)
    if not anew:
        module.watchers.begin_anew = lambda handle: None
    with mock.patch.object(module, "ops", ops), mock.patch.object(module.watchers, "ops", ops):
        workspace.recover(rank.group)
    workspace.close()
    return len(answers)


@pytest.mark.parametrize("anew", [True, False], ids=["", "control"])
def test_who_tells_of_an_old_fault_answers_no_new_one(anew: bool) -> None:
    with RankPool(2) as pool:
        assert pool.run(told_late, anew) == [int(not anew)] * 2


def held_for(early: bool) -> float:
    """Seconds that the first fault of a workspace takes, of which 0.1 are its deadline and 0.6 its hold. early: one who
    has told of a fault that has been forgotten since answers before that."""
    from common.virtual import VirtualGroup

    group = VirtualGroup(2, 1, 64, torch.float32, deadline=0.1, hold=0.6)
    if early:
        torch.ops.mnnvl_ar._workspace_answer(group.handles[0])
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        mnnvl_ar.ops.all_reduce(torch.ones(1, 64), group.handles[0])
    return time.monotonic() - began


@pytest.mark.parametrize("early", [True, False])
def test_an_answer_is_of_the_fault_that_is_there(early: bool) -> None:
    assert held_for(early) >= 0.7


def fails_to_recover(rank: Rank, graphs: int) -> tuple[bool, bool]:
    """After a fault that was told, `recover` puts the workspace to sleep and fails: whether it is watched before and
    after. graphs: that are alive, as far as the workspace knows."""
    import mnnvl_ar.workspace as module
    from mnnvl_ar.memory import symmetric

    workspace = rank.new_workspace(max_tokens=1, hidden=64, deadline=0.1)
    if rank.rank == 0:
        fail_alone(workspace)
    watched = module.watchers._monitor._watched
    until = time.monotonic() + 20.0
    while workspace.handle in watched and time.monotonic() < until:
        time.sleep(0.01)
    before = workspace.handle in watched
    ops = mock.Mock(wraps=module.ops, _workspace_graphs=lambda handle: graphs)
    refusal = mock.patch.object(symmetric, "_bring_up", side_effect=mnnvl_ar.BringUpError(1, "a step", "no"))
    with mock.patch.object(module, "ops", ops):
        with refusal, pytest.raises(mnnvl_ar.BringUpError):
            workspace.recover(rank.group)
        after = workspace.handle in watched
    workspace.recover(rank.group)
    workspace.check()
    workspace.close()
    return before, after


@pytest.mark.parametrize("graphs", [1, 0])
def test_what_replays_find_is_told_where_recover_has_failed(graphs: int) -> None:
    with RankPool(2) as pool:
        assert pool.run(fails_to_recover, graphs) == [(False, bool(graphs))] * 2
