"""Closing, sleeping and waking, from another thread or from a signal's handler: in turn, or an error; never memory that
goes while somebody is at it. Control: without turns the process ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch

import mnnvl_ar.workspace as module
from common.cases import gone
from common.ranks import RankPool, RanksFailed
from mnnvl_ar import monitor, ops

SMALL = {"max_tokens": 2, "hidden": 64, "deadline": 60.0}
AT_ONCE = 10.0  # seconds, for what takes a tenth of one; the deadline is 60 s


def row(value: float = 1.0) -> torch.Tensor:
    return torch.full((1, 64), value, dtype=torch.bfloat16)


def recovered(rank: Any, second: str, rounds: int, in_turn: bool) -> list[str]:
    """Rank 0 recovers, which ends a call of another thread; that one then does `second`. What that raised."""
    raised: list[str] = []
    for _ in range(rounds):
        workspace = rank.new_workspace(**SMALL, monitor=False)
        if not in_turn:
            workspace._turn = mock.Mock(of=lambda *_: contextlib.nullcontext())
        call = threading.Thread(target=interrupted, args=(workspace, second, raised))
        if rank.rank == 0:
            call.start()
            time.sleep(0.05)  # it mostly waits in its call by then; if not, it is refused, and nothing is shown
        with contextlib.suppress(Exception):  # as it is asleep by then, or closed
            workspace.recover(rank.group, timeout=5.0)
        if rank.rank == 0:
            call.join()
        workspace.close(force=True)
    return raised


def interrupted(workspace: Any, second: str, raised: list[str]) -> None:
    try:
        ops.all_reduce(row(), workspace.handle)
    except RuntimeError:
        try:
            getattr(workspace, second)()
        except Exception as error:
            raised.append(str(error))


@pytest.mark.parametrize("second", ["close", "sleep"])
def test_whoever_comes_second_waits(second: str) -> None:
    with RankPool(2) as pool:
        pool.run(recovered, second, 6, True)


def test_control_without_turns_the_process_ends() -> None:
    pool = RankPool(2)
    with pytest.raises(RanksFailed, match="exit code -11"):
        pool.run(recovered, "close", 40, False)
    pool.discard()


def call_in_vain(handle: int) -> None:
    with contextlib.suppress(RuntimeError):
        ops.all_reduce(row(), handle)


def forced(rank: Any, second: str, deadline: float, hurries: bool) -> float:
    """Rank 0 waits in a call, and another thread sleeps, which waits for that call, as it does on a GPU. The seconds
    from the beginning of the call to the end of `second`."""
    workspace = rank.new_workspace(**{**SMALL, "deadline": deadline}, monitor=False)
    rank.barrier()
    took, real = 0.0, module.ops
    if rank.rank == 0:
        call, waits = threading.Thread(target=call_in_vain, args=(workspace.handle,)), threading.Event()

        def sleep(handle: int, end: bool) -> None:
            waits.set()
            call.join()
            real._workspace_sleep(handle, end)

        end = real._workspace_end_calls if hurries else lambda handle: None
        slow = mock.Mock(wraps=real, _workspace_sleep=sleep, _workspace_end_calls=end)
        with mock.patch.object(module, "ops", slow):
            sleeper = threading.Thread(target=workspace.sleep)
            began = time.monotonic()
            call.start()
            gone.until(lambda: gone.begun(workspace, 0) > 0, "the call does not begin")
            sleeper.start()
            waits.wait()
            if second == "close":
                workspace.close(force=True)
            else:
                rank.store.set("recovering", "")
                workspace.recover(rank.group)
            took = time.monotonic() - began
            sleeper.join()
    elif second == "recover":
        rank.store.wait(["recovering"])
        workspace.recover(rank.group)
    if second == "recover":
        assert float(ops.all_reduce(row(), workspace.handle)[0, 0]) == 2.0
    rank.barrier()
    workspace.close(force=True)
    return took


@pytest.mark.parametrize("second", ["close", "recover"])
def test_force_ends_what_another_thread_waits_for(second: str) -> None:
    with RankPool(2) as pool:
        assert pool.run(forced, second, 60.0, True)[0] < AT_ONCE
        assert pool.run(forced, second, 3.0, False)[0] >= 3.0, "the control waits for the deadline"


def interrupt_when(is_so: Any) -> None:
    """Sends this process a signal then, a little later: when what has begun waits."""

    def send() -> None:
        gone.until(is_so, "what is to be interrupted does not begin")
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=send).start()


def handled(rank: Any, verb: str) -> tuple[str, float, str, float]:
    """Rank 0 waits in a call, and a signal's handler does `verb` on its workspace: what that raised and after how many
    seconds; what the call then ended with, and after how many. Rank 1 comes to the call after that; if the handler has
    ended it, when it has."""
    workspace, found = rank.new_workspace(**SMALL), ["", 0.0, "", 0.0]
    verbs = {
        "close": lambda: workspace.close(force=True),
        "close gently": workspace.close,
        "sleep": workspace.sleep,
        "call": lambda: ops.all_reduce(row(), workspace.handle),
    }

    def handler(*_: object) -> None:
        began = time.monotonic()
        try:
            verbs[verb]()
        except RuntimeError as error:
            found[:2] = str(error), time.monotonic() - began
        if verb != "close":
            rank.store.set("handled", "")

    rank.barrier()
    if rank.rank == 0:
        signal.signal(signal.SIGUSR1, handler)
        interrupt_when(lambda: gone.begun(workspace, 0) > 0)
        began = time.monotonic()
        try:
            assert float(ops.all_reduce(row(), workspace.handle)[0, 0]) == 2.0
        except RuntimeError as error:
            found[2] = str(error)
        found[3] = time.monotonic() - began
        rank.store.set("handled", "")
    else:
        rank.store.wait(["handled"], timedelta(seconds=gone.PATIENCE))
        with contextlib.suppress(RuntimeError):  # of a call that the other has given up
            ops.all_reduce(row(), workspace.handle)
    workspace.close(force=True)
    return tuple(found)  # type: ignore[return-value]


@pytest.mark.parametrize("verb", ["close gently", "sleep", "call"])
def test_a_handler_is_told_that_its_own_thread_is_in_a_call(verb: str) -> None:
    with RankPool(2) as pool:
        said, after, ended, took = pool.run(handled, verb)[0]
    assert "call" in said
    assert "which a signal's handler interrupts" in said
    assert after < AT_ONCE
    assert (ended, took < AT_ONCE) == ("", True), "the call itself goes on"


def test_a_handler_that_closes_by_force_ends_the_call() -> None:
    with RankPool(2) as pool:
        said, after, ended, took = pool.run(handled, "close")[0]
    assert "which a signal's handler interrupts, and which ends now; once more when" in said
    assert after < AT_ONCE
    assert "ended" in ended
    assert took < AT_ONCE


def twice_broken(rank: Any, where: str) -> list[str]:
    """Two faults, with a recovery between them while the first is still reported: by another thread, or in `on_fault`
    itself. What `on_fault` heard."""
    heard: list[str] = []
    recovered: list[bool] = []

    def on_fault(error: Exception) -> None:
        heard.append(type(error).__name__)
        if where == "in on_fault":
            workspace.recover(rank.group)
            recovered.append(True)
        else:
            time.sleep(1.0)

    workspace = rank.new_workspace(**{**SMALL, "deadline": 0.5}, on_fault=on_fault)
    for number in (1, 2):
        rank.barrier()
        if rank.rank == 0:
            with contextlib.suppress(RuntimeError):
                ops.all_reduce(row(), workspace.handle)
        until = time.monotonic() + 20
        while len(heard) < number and time.monotonic() < until:
            time.sleep(0.01)
        if where == "in on_fault":
            while len(recovered) < number and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.5)  # until it has returned
        else:
            workspace.recover(rank.group)
    workspace.close(force=True)
    return heard


@pytest.mark.parametrize("where", ["in on_fault", "beside it"])
def test_what_is_recovered_while_its_fault_is_reported_is_watched_again(where: str) -> None:
    with RankPool(2) as pool:
        for heard in pool.run(twice_broken, where):
            assert heard == ["PeerTimeout"] * 2


def slept_and_woken(rank: Any) -> bool:
    """Whether a workspace is watched that one thread put to sleep, slowly at its end, and another one woke."""
    workspace = rank.new_workspace(**SMALL)
    forget, inside = monitor.forget, threading.Event()

    def slow(handle: int) -> Any:
        inside.set()
        time.sleep(0.3)
        return forget(handle)

    with mock.patch.object(monitor, "forget", slow):
        sleeper = threading.Thread(target=workspace.sleep)
        sleeper.start()
        assert inside.wait(gone.PATIENCE)
        workspace.wake(rank.group)
        sleeper.join()
    watched = workspace.handle in monitor._monitor._watched
    workspace.close()
    return watched


def test_what_wakes_behind_a_slow_sleeper_is_watched() -> None:
    with RankPool(2) as pool:
        assert pool.run(slept_and_woken) == [True, True]


def nested(rank: Any) -> str:
    """What a handler hears that closes while its own thread wakes."""
    workspace, said = rank.new_workspace(**SMALL), [""]
    workspace.sleep()
    if rank.rank == 0:

        def handler(*_: object) -> None:
            try:
                workspace.close()
            except RuntimeError as error:
                said[0] = str(error)
            rank.store.set("handled", "")

        signal.signal(signal.SIGUSR1, handler)
        interrupt_when(lambda: workspace._turn._verb == "wake")
    else:
        rank.store.wait(["handled"], timedelta(seconds=gone.PATIENCE))
    workspace.wake(rank.group)
    assert float(ops.all_reduce(row(), workspace.handle)[0, 0]) == 2.0
    workspace.close()
    return said[0]


def test_a_handler_that_closes_while_its_thread_wakes_is_told() -> None:
    with RankPool(2) as pool:
        said, _ = pool.run(nested)
    assert "close: this thread is in wake of this workspace, which a signal's handler interrupts" in said
