"""Ranks that are gone: killed, closed, asleep, ended. What the others are told, when, and when not."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from common.cases.calls import Call, check_calls

SMALL = {"max_tokens": 8, "hidden": 64, "dtype": torch.bfloat16}
PATIENCE = 30.0  # for what is there at once on a machine that is not busy; far below any deadline that must not end it
HEARD = 0.5  # seconds of quiet in which what must not be said would have been, ten times over

Told = tuple[str, int, str, float]  # error class, the rank it names, its text, when (time.monotonic)


def until(is_so: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def one_call(rank: Any, workspace: Any, tokens: int = 1) -> None:
    from mnnvl_ar import ops

    ops.all_reduce(torch.ones(tokens, 64, dtype=torch.bfloat16, device=rank.device), workspace.handle)


def told(workspace: Any) -> Told | None:
    from mnnvl_ar import WorkspaceBroken

    try:
        workspace.check()
    except WorkspaceBroken as error:
        return type(error).__name__, error.peer, str(error), time.monotonic()
    return None


def call_in_vain(rank: Any, workspace: Any) -> Told:
    """A call that has to fail; its own text is in front."""
    try:
        one_call(rank, workspace)
    except RuntimeError as error:
        when, text = time.monotonic(), str(error)
    else:
        raise AssertionError("the call was completed")
    found = told(workspace)
    assert found is not None, text
    return found[0], found[1], f"{text}\n{found[2]}", when


def timed_call_in_vain(rank: Any, workspace: Any) -> Told:
    """The same, with the seconds that it took."""
    began = time.monotonic()
    kind, peer, text, when = call_in_vain(rank, workspace)
    return kind, peer, text, when - began


def graphs_live() -> Any:
    """As if captured graphs held every workspace that is closed meanwhile."""
    import mnnvl_ar.workspace as module

    return mock.patch.object(module, "ops", mock.Mock(wraps=module.ops, _workspace_close=lambda *_: False))


def begun(workspace: Any, rank: int) -> int:
    """Calls that a rank has begun, as its block says."""
    return begun_in(workspace._memory, rank)


def begun_in(memory: Any, rank: int) -> int:
    return int.from_bytes(memory._block.driver.read(memory.pointers[rank], 4), "little")


def killed(
    rank: Any, victim: int, others_call: bool, deadline: float = 60.0, monitor: bool = True, child: str = ""
) -> Told | None:
    """The victim is killed, when the others wait for it in a call, or between two calls. It leaves the time in the
    store.

    child: "" or what a forked child of the victim does that outlives it: "closes" its copies of the connections, or
           "holds" them, as it would without our hook.
    """
    from mnnvl_ar.memory import connection, lifeline

    workspace = rank.new_workspace(**SMALL, deadline=deadline, monitor=monitor)
    check_calls(rank, [Call(tokens=2), Call(tokens=8, seed=1)], handle=workspace.handle)
    rank.barrier()
    if rank.rank == victim:
        before = begun(workspace, victim)
        others = [other for other in range(rank.world_size) if other != victim]
        if others_call:
            until(lambda: all(begun(workspace, other) > before for other in others), "the others do not call")
        if child == "holds":
            lifeline._open.clear()
            connection._open.clear()
        if child and os.fork() == 0:
            until(lambda: rank.store.check(["over"]), "the test does not end")
            os._exit(0)
        rank.store.set("killed", str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    found = call_in_vain(rank, workspace) if others_call else None
    if found is None:
        until(lambda: told(workspace) is not None, "nobody is told")
        found = told(workspace)
    rank.store.add("ended", 1)
    until(lambda: rank.store.add("ended", 0) == rank.world_size - 1, "the others are not told")
    rank.store.set("over", "")
    assert rank.store.get("killed")
    took = found[3] - float(rank.store.get("killed").decode())
    workspace.close(force=True)
    return *found[:3], took


class Log:
    """What the monitor has logged as errors."""

    def __enter__(self) -> list[str]:
        self._texts: list[str] = []
        self._handler = logging.Handler(logging.ERROR)
        self._handler.emit = lambda record: self._texts.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("mnnvl_ar").addHandler(self._handler)
        return self._texts

    def __exit__(self, *_: object) -> None:
        logging.getLogger("mnnvl_ar").removeHandler(self._handler)


LEAVES = {
    "close": "has closed its workspace",
    "sleep": "has put its workspace to sleep",
    "checkpoint_prepare": "has given its workspace up for a checkpoint",
    "recover": "recovers its workspace, or wakes it",
    "exit": "has ended its process",
}


def leaves(rank: Any, how: str, victim: int, deadline: float = 60.0, monitor: bool = True) -> tuple[str, str, float]:
    """One rank leaves after some calls. The next rank then calls, and is told who left, and how; the others call
    nothing, and nothing is said there. Returns what the one that calls was told: class, text, seconds."""
    workspace = rank.new_workspace(**SMALL, deadline=deadline, monitor=monitor)
    caller, result = (victim + 1) % rank.world_size, ("", "", 0.0)
    with Log() as log:
        check_calls(rank, [Call(tokens=2), Call(tokens=8, seed=1)], handle=workspace.handle)
        recovering = None
        if rank.rank == victim:
            recovering = _leave(rank, workspace, how)
        elif rank.rank == caller:
            rank.store.wait(["leaving"])
            time.sleep(HEARD)  # until it is known, and some time to see that it is no fault
            assert told(workspace) is None
            assert log == []
            began = time.monotonic()
            kind, peer, text, when = call_in_vain(rank, workspace)
            assert not monitor or peer == victim, text
            result = kind, text, when - began
            if monitor:
                until(lambda: len(log) == 1, "the monitor says nothing")
                assert LEAVES[how] in log[0]
            rank.store.set("ended", "")
        else:
            rank.store.wait(["ended"])
            time.sleep(HEARD)
            assert not monitor or told(workspace) is None
            assert log == []
    rank.store.add("over", 1)
    until(lambda: rank.store.add("over", 0) >= rank.world_size - (how == "exit"), "the others do not end")
    if how in ("sleep", "checkpoint_prepare", "recover"):
        if recovering is None:
            workspace.checkpoint_restore(rank.group)
        else:
            recovering.join(PATIENCE)
            assert not recovering.is_alive()
        check_calls(rank, [Call(tokens=2, seed=2), Call(tokens=8)], handle=workspace.handle)
        rank.barrier()
    workspace.close(force=True)
    return result


def two_leave(rank: Any) -> Told | None:
    """One rank leaves; another calls in vain, and leaves too, one call later. The third still hears of the first."""
    workspace = rank.new_workspace(**SMALL, deadline=60.0)
    check_calls(rank, [Call(tokens=2)], handle=workspace.handle)
    found = None
    if rank.rank == 1:
        workspace.close()
        rank.store.set("first", "")
    elif rank.rank == 2:
        rank.store.wait(["first"])
        assert call_in_vain(rank, workspace)[1] == 1
        workspace.close()
        rank.store.set("second", "")
    else:
        rank.store.wait(["second"])
        until(lambda: len(workspace._memory.lifeline._gone) == 2, "it does not hear of both")
        found = timed_call_in_vain(rank, workspace)
        workspace.close()
    return found


def falls_with_it(rank: Any) -> Told | None:
    """One rank leaves; the next one calls in vain, and dies of that, as servers do. The last one calls after that, and
    hears who was first."""
    workspace = rank.new_workspace(**SMALL, deadline=60.0)
    check_calls(rank, [Call(tokens=2)], handle=workspace.handle)
    rank.barrier()
    found = None
    if rank.rank == 2:
        workspace.close()
        rank.store.set("first", "")
    elif rank.rank == 0:
        rank.store.wait(["first"])
        assert call_in_vain(rank, workspace)[1] == 2
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        until(lambda: told(workspace) is not None, "it does not hear of a death")
        found = timed_call_in_vain(rank, workspace)
    workspace.close(force=True)
    return found


def _leave(rank: Any, workspace: Any, how: str) -> threading.Thread | None:
    """`recover` is collective: the thread that is in it, while another rank calls."""
    from mnnvl_ar import monitor

    if how == "exit":
        rank.store.set("leaving", "")
        multiprocessing.util._exit_function()  # as a child of multiprocessing ends
        os._exit(0)
    if how == "recover":
        recovering = threading.Thread(target=workspace.recover, args=(rank.group,))
        recovering.start()
        until(lambda: workspace._memory.lifeline.has_left, "it does not leave")
        rank.store.set("leaving", "")
        return recovering
    before = sockets()
    getattr(workspace, how)()
    assert sockets() < before
    if how == "checkpoint_prepare":
        assert monitor._monitor._thread is None
        assert not any("mnnvl_ar" in thread.name for thread in threading.enumerate())
    rank.store.set("leaving", "")
    return None


def sockets() -> int:
    links = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sum(link.is_symlink() and os.readlink(link).startswith("socket:") for link in links)


def check_normal_ends(rank: Any) -> None:
    """No fault: ranks that drop their workspace, close it, or end, each after the last call, while others still
    work."""
    workspace = rank.new_workspace(**SMALL)
    with Log() as log:
        check_calls(rank, [Call(tokens=2), Call(tokens=8, seed=1)], handle=workspace.handle)
        other = rank.new_workspace(**SMALL)
        rank.barrier()
        if rank.rank == 2:
            multiprocessing.util._exit_function()
            os._exit(0)
        if rank.rank == 1:
            workspace.close()
            del other
            gc.collect()
        time.sleep(HEARD)
        if rank.rank == 0:
            assert told(workspace) is None
            assert told(other) is None
        assert log == []


def check_kept(rank: Any) -> None:
    """Closed while graphs are alive: nothing is said, and a death is still heard and passed on, until they are gone."""
    import mnnvl_ar.workspace as module

    workspace = rank.new_workspace(**SMALL, deadline=60.0)
    check_calls(rank, [Call(tokens=2)], handle=workspace.handle)
    rank.barrier()
    if rank.rank == 0:
        line = workspace._memory.lifeline
        with graphs_live():
            workspace.close()
            assert not line.has_left
            time.sleep(HEARD)
            assert not line.has_left
            rank.barrier()
        module._give_back_kept()
        assert line.has_left
        rank.barrier()
    else:
        rank.barrier()
        rank.barrier()
        assert call_in_vain(rank, workspace)[:2] == ("PeerGone", 0)
        workspace.close()


def fails_after_close(rank: Any) -> tuple[int, list[str], str]:
    """Rank 0 closes while a graph is alive, as far as the workspace knows, and its replay waits in vain: how often
    `on_fault` was called, what was logged, what `check` says."""
    import mnnvl_ar.workspace as module

    heard: list[Exception] = []
    workspace = rank.new_workspace(**SMALL, deadline=0.3, on_fault=heard.append)
    said, logged = "", list[str]()
    rank.barrier()
    if rank.rank == 0:
        with Log() as log, graphs_live():
            workspace.close()
            with contextlib.suppress(RuntimeError):
                one_call(rank, workspace)
            until(lambda: bool(heard), "nobody is told")
            time.sleep(HEARD)
            logged += log
        try:
            workspace.check()
        except RuntimeError as error:
            said = str(error)
        module._give_back_kept()
    rank.barrier()
    workspace.close(force=True)
    return len(heard), logged, said


def dies_after_close(rank: Any, calls: bool) -> list[str]:
    """Rank 1 is killed when rank 0 has closed, while a graph is alive, as far as that knows. What `on_fault` of rank 0
    was called with. calls: a replay waits for rank 1."""
    import mnnvl_ar.workspace as module

    def replayed() -> None:
        with contextlib.suppress(RuntimeError):
            one_call(rank, workspace)

    heard: list[str] = []
    workspace = rank.new_workspace(**SMALL, deadline=60.0, on_fault=lambda error: heard.append(str(error)))
    rank.barrier()
    if rank.rank == 1:
        rank.store.wait(["closed"])
        os.kill(os.getpid(), signal.SIGKILL)
    memory = workspace._memory
    with graphs_live():
        workspace.close()
        replay = threading.Thread(target=replayed)
        if calls:
            replay.start()
            until(lambda: begun_in(memory, 0) > 0, "it does not begin")
        rank.store.set("closed", "")
        until(lambda: not memory.lifeline._connections, "it does not hear of the death")
        time.sleep(1.0 + HEARD)  # two looks
        if calls:
            replay.join()
    module._give_back_kept()
    return heard


def looks(rank: Any, seconds: float, backs_off: bool) -> tuple[int, float]:
    """How often rank 0 looks, in so many seconds, for a call that rank 1, which has closed, owes something; and how
    long it then takes to end one. `backs_off` off is the control."""
    from mnnvl_ar import monitor

    workspace, found = rank.new_workspace(**SMALL, deadline=60.0), (0, 0.0)
    check_calls(rank, [Call(tokens=2), Call(tokens=8, seed=1)], handle=workspace.handle)
    rank.barrier()
    if rank.rank == 1:
        workspace.close()
        rank.store.set("leaving", "")
    else:
        lose = mock.Mock(side_effect=monitor.ops._workspace_lose)
        counted = mock.Mock(wraps=monitor.ops, _workspace_lose=lose)
        longest = monitor.PERIOD if backs_off else monitor.GLANCE
        with mock.patch.object(monitor, "ops", counted), mock.patch.object(monitor, "PERIOD", longest):
            rank.store.wait(["leaving"])
            until(lambda: lose.called, "it does not hear")
            lose.reset_mock()
            time.sleep(seconds)
            many, began = lose.call_count, time.monotonic()
            kind, peer, text, when = call_in_vain(rank, workspace)
            assert (kind, peer) == ("PeerGone", 1), text
            found = many, when - began
        lose.reset_mock()
        time.sleep(2 * monitor.PERIOD)
        assert not lose.called, "there is nothing more to look for"
    rank.barrier()
    workspace.close()
    return found
