"""Whose a workspace is, and who may end its calls: copies, other processes, other threads, signals, the monitor."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import logging
import os
import pickle
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from common.cases.bad_input import expect
from common.cases.calls import Call, check_calls
from common.cases.ends import SMALL, held
from common.cases.lifecycle import make_fail, one_call

PATIENCE = 20.0


@contextlib.contextmanager
def logged(level: int = logging.INFO) -> Iterator[list[str]]:
    """What the library logs meanwhile."""
    texts: list[str] = []
    log, handler = logging.getLogger("mnnvl_ar"), logging.Handler(level)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    before = log.level
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield texts
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def check_copies(rank: Any) -> None:
    """A copy is the workspace itself, closed with it, and none leaves the process."""
    workspace = rank.new_workspace(**SMALL)
    holder = {"layers": [workspace, workspace]}
    assert copy.copy(workspace) is copy.deepcopy(holder)["layers"][1] is workspace
    for send in (pickle.dumps, lambda value: torch.save({"workspace": value}, os.devnull)):
        expect(lambda send=send: send(workspace), "a Workspace cannot be pickled", "pickle", TypeError)
    rank.barrier()
    copy.copy(workspace).close()
    before = held()
    workspace.close()
    assert held() == before
    with rank.new_workspace(**SMALL) as other:
        check_calls(rank, [Call(tokens=2)], handle=other.handle)
        rank.barrier()


def check_foreign(rank: Any) -> None:
    """A forked child, and its own child, take no handle of their parents for theirs."""
    workspace = rank.workspace(**SMALL)
    check_calls(rank, [Call(tokens=2)], handle=workspace.handle)
    assert in_child(lambda: foreign(rank, workspace)) == 0
    check_calls(rank, [Call(tokens=3)], handle=workspace.handle)


def foreign(rank: Any, workspace: Any, depth: int = 2) -> None:
    import torch.distributed as dist

    from mnnvl_ar import Workspace, ops

    group = dist.ProcessGroup(dist.HashStore(), 0, 1)
    uses = {
        "call": lambda: ops.all_reduce(torch.ones(1, 64), workspace.handle),
        "fits": lambda: workspace.fits(1, 64, torch.float32),
        "check": workspace.check,
        "sleep": workspace.sleep,
        "wake": lambda: workspace.wake(group),
        "deadline": lambda: setattr(workspace, "deadline", 1.0),
    }
    for name, use in uses.items():
        expect(use, "belongs to the parent of this forked", name)
    workspace.close()
    own = Workspace(group, 8, 64, torch.float32, device="cpu")
    assert own.handle != workspace.handle
    assert torch.equal(ops.all_reduce(torch.ones(2, 64), own.handle), torch.ones(2, 64))
    if depth:
        assert in_child(lambda: foreign(rank, own, depth - 1)) == 0
    own.check()
    own.close()


def in_child(function: Callable[[], object]) -> int:
    """The status of a forked child that calls `function`."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


RAISED: dict[str, type[BaseException]] = {
    "SystemExit": SystemExit,
    "KeyboardInterrupt": KeyboardInterrupt,
    "ValueError": ValueError,
}


def check_on_fault_raises(rank: Any, name: str) -> None:
    """Whatever `on_fault` of one workspace raises, the next one's is called."""
    told: list[Exception] = []

    def raises(error: Exception) -> None:
        raise RAISED[name]("injected")

    with logged() as texts:
        made = [rank.new_workspace(**SMALL, deadline=0.3, on_fault=each) for each in (raises, told.append)]
        for workspace in made:
            rank.barrier()
            if rank.rank == 0:
                make_fail(rank, workspace)
        until(lambda: told, "the second workspace's on_fault was not called")
        line = f"on_fault of workspace {made[0].handle} failed"
        assert any(line in text and name in text for text in texts), f"nothing says what on_fault raised: {texts}"
    rank.barrier()
    for workspace in made:
        workspace.close()


class Owner:
    """Holds a workspace whose `on_fault` is a method of its own."""

    def __init__(self, rank: Any) -> None:
        self.workspace = rank.new_workspace(**SMALL, on_fault=self.on_fault)

    def on_fault(self, error: Exception) -> None:
        pass


def check_owner_is_not_kept(rank: Any) -> None:
    """The monitor keeps no one alive by `on_fault`; a workspace that goes without close() is one log line."""
    with logged() as texts:
        owner = Owner(rank)
        handle, gone = owner.workspace.handle, weakref.ref(owner)
        del owner
        gc.collect()
        assert gone() is None
        said = [text for text in texts if "was dropped without close()" in text]
        assert len(said) == 1, texts
        assert f"workspace {handle} was" in said[0]
    rank.barrier()


def check_blocking_log(rank: Any) -> None:
    """`on_fault` does not wait for a log that blocks, so the held call ends when it has returned, and not by `hold`."""
    told: list[float] = []
    release = threading.Event()
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: release.wait(60)  # type: ignore[method-assign, assignment]
    workspace = rank.new_workspace(
        **SMALL, deadline=0.3, hold=PATIENCE, on_fault=lambda error: told.append(time.monotonic())
    )
    logging.getLogger("mnnvl_ar").addHandler(handler)
    try:
        rank.barrier()
        began = time.monotonic()
        if rank.rank == 0:
            make_fail(rank, workspace)
            assert time.monotonic() - began < PATIENCE, "the call was held to the end"
        until(lambda: told, "on_fault waits for the log")
    finally:
        release.set()
        logging.getLogger("mnnvl_ar").removeHandler(handler)
    rank.barrier()
    workspace.close()


class Waiting:
    """A call of rank 0 in a thread of its own, which no peer comes to."""

    def __init__(self, rank: Any, workspace: Any) -> None:
        self.said = ""
        self._rank, self._workspace = rank, workspace
        begun, before = ctypes.c_uint32.from_address(workspace._memory.pointers[rank.rank]), 0
        before = begun.value
        self._thread = threading.Thread(target=self._call)
        self._thread.start()
        until(lambda: begun.value != before, "the call does not begin")

    def _call(self) -> None:
        try:
            one_call(self._rank, self._workspace)
        except RuntimeError as error:
            self.said = str(error)

    def end(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the call still waits"


def check_close_ends_calls(rank: Any) -> None:
    workspace = rank.new_workspace(**SMALL, deadline=None, monitor=False)
    rank.barrier()
    if rank.rank == 0:
        waiting = Waiting(rank, workspace)
        expect(workspace.close, "is in a call of another thread", "close without force")
        workspace.close(force=True)
        waiting.end()
        assert "close(force=True), wake() or recover() on this rank has ended this call" in waiting.said
    rank.barrier()
    workspace.close(force=True)


def check_recover_ends_calls(rank: Any) -> None:
    workspace = rank.new_workspace(**SMALL, deadline=None, monitor=False)
    for _ in range(2):
        rank.barrier()
        waiting = Waiting(rank, workspace) if rank.rank == 0 else None
        workspace.recover(rank.group)
        if waiting is not None:
            waiting.end()
            assert "recover() on this rank has ended this call" in waiting.said
        rank.barrier()
        check_calls(rank, [Call(tokens=2), Call(tokens=8)], handle=workspace.handle)
    rank.barrier()
    workspace.close()


class Stopped(BaseException):
    pass


def check_signal(rank: Any, raises: bool) -> None:
    """In a wait a signal's handler runs at once. If it raises, the call ends and that comes out, and peers are told; if
    not, the wait goes on, to its deadline."""
    deadline = 6.0 if not raises else None
    workspace = rank.new_workspace(**SMALL, deadline=deadline, monitor=False)
    ran: list[float] = []

    def handler(number: int, frame: object) -> None:
        ran.append(time.monotonic())
        if raises:
            raise Stopped

    rank.barrier()
    if rank.rank == 0:
        begun = ctypes.c_uint32.from_address(workspace._memory.pointers[0])
        before, sent = begun.value, list[float]()

        def send() -> None:
            until(lambda: begun.value != before, "the call does not begin")
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

        kept = signal.signal(signal.SIGTERM, handler)
        threading.Thread(target=send).start()
        try:
            with pytest.raises(Stopped if raises else RuntimeError, match="" if raises else "for rank 1"):
                call_and_go_on(rank, workspace, raises)
        finally:
            signal.signal(signal.SIGTERM, kept)
        assert len(ran) == 1
        assert ran[0] - sent[0] < (4.0 if not raises else PATIENCE)
        if raises:
            expect(workspace.check, "rank 0 ended its call itself", "interrupted", kind=RuntimeError)
    else:
        until(lambda: broken_text(workspace), "nobody was told")
        wanted = "rank 0 ended its call itself" if raises else "waited"
        assert wanted in broken_text(workspace)
    rank.barrier()
    workspace.close()


def call_and_go_on(rank: Any, workspace: Any, raises: bool) -> None:
    try:
        one_call(rank, workspace)
    except RuntimeError:
        if not raises:
            raise
        for _ in range(1000):  # what the handler raised comes when Python runs again
            time.sleep(0)


def broken_text(workspace: Any) -> str:
    import mnnvl_ar

    try:
        workspace.check()
    except mnnvl_ar.WorkspaceBroken as error:
        return str(error)
    return ""


def check_says_what_it_is(rank: Any) -> None:
    """repr, and the bring-up's log line on rank 0."""
    import mnnvl_ar

    with logged() as texts:
        workspace = rank.new_workspace(**SMALL, strategy="two_shot")
    parts = ("tokens=8", "hidden=64", "dtype=torch.bfloat16", "strategy=two_shot", "group=", "transport=")
    nbytes = f"nbytes={workspace.nbytes}"
    for text in [repr(workspace), *(texts if rank.rank == 0 else [])]:
        assert all(part in text for part in (*parts, nbytes)), text
    assert len(texts) == (rank.rank == 0), texts
    told = mnnvl_ar.Workspace.bytes_for(rank.world_size, 8, 64, torch.bfloat16, device=rank.device, strategy="two_shot")
    assert told <= workspace.nbytes < told + 4096
    assert workspace.fits(8, 64, torch.bfloat16, strategy="one_shot")
    assert not workspace.fits(8, 12, torch.bfloat16)
    rank.barrier()
    workspace.sleep()
    assert ", asleep" in repr(workspace)
    uses: dict[str, Callable[[], object]] = {
        "check": workspace.check,
        "fits": lambda: workspace.fits(8, 64, torch.bfloat16),
    }
    for name, use in uses.items():
        expect(use, f"{name}: this workspace is asleep", name, mnnvl_ar.MnnvlArError)
    workspace.wake(rank.group)
    workspace.check()
    rank.barrier()
    workspace.close()
    for name, use in uses.items():
        expect(use, f"{name}: this workspace is closed", name, mnnvl_ar.MnnvlArError)


def check_nonsense(rank: Any) -> None:
    """What was None, or no number, is said by name, and nobody waits for it."""
    from mnnvl_ar import ops

    workspace = rank.workspace(**SMALL)
    x, weight = torch.ones(2, 64), torch.ones(64)
    for name, use, pattern in (
        ("wake", lambda: workspace.wake(None), "group: is None, wanted"),
        ("recover", lambda: workspace.recover(None), "group: is None, wanted"),
        ("timeout", lambda: workspace.wake(rank.group, timeout=None), "timeout: is None, wanted"),
        ("tokens", lambda: workspace.fits(None, 64, torch.float32), "tokens: is None, wanted"),
        ("hidden", lambda: workspace.fits(1, "64", torch.float32), "hidden: is '64', wanted"),
        ("too many", lambda: workspace.fits(1 << 70, 64, torch.float32), "tokens: is 1180591620717411303424, wanted"),
        ("dtype", lambda: workspace.fits(1, 64, None), "dtype: is None, wanted"),
        ("strategy", lambda: workspace.fits(1, 64, torch.float32, None), "strategy: is None, wanted"),
        ("deadline", lambda: setattr(workspace, "deadline", "1"), "deadline: is '1', wanted"),
        ("on_fault", lambda: rank.new_workspace(**SMALL, on_fault=3), "on_fault: is 3, wanted a function"),
    ):
        expect(use, pattern, name, ValueError)
    for name, use, pattern in (
        ("x", lambda: ops.all_reduce_rms_norm(None, x, weight, 1e-6, workspace.handle), "x: is None, wanted a tensor"),
        ("x, out", lambda: ops.all_reduce_out(None, x, workspace.handle), "x: is None, wanted a tensor"),
        ("residual", lambda: ops.all_reduce_rms_norm(x, None, weight, 1e-6, workspace.handle), "residual: is None"),
        ("complex", lambda: ops.all_reduce(x.to(torch.complex64), workspace.handle), "x: is ComplexFloat, wanted"),
        ("bool", lambda: ops.all_reduce(x.bool(), workspace.handle), "x: is Bool, wanted"),
    ):
        expect(use, pattern, name)
    rank.barrier()
    check_calls(rank, [Call(tokens=2)], handle=workspace.handle)


ROUNDS = ("make", "sleep", "recover", "force", "agree")


def check_rounds_of(rank: Any, path: str, rounds: int = 200) -> None:
    """One way through a workspace's life, over and over: descriptors, mappings and threads are as before."""
    from mnnvl_ar.memory import agree

    kept = rank.new_workspace(**SMALL, deadline=None)
    for number in range(rounds + 5):
        if number == 5:
            rank.barrier()
            before = (*held(), threading.active_count())
        if path == "make":
            rank.new_workspace(**SMALL).close()
        elif path == "sleep":
            rank.barrier()
            kept.sleep()
            kept.wake(rank.group)
        elif path == "recover":
            waiting = Waiting(rank, kept) if rank.rank == 0 else None
            kept.recover(rank.group)
            if waiting is not None:
                waiting.end()
        elif path == "force":
            workspace = rank.new_workspace(**SMALL, deadline=None)
            waiting = Waiting(rank, workspace) if rank.rank == 0 else None
            workspace.close(force=True)
            if waiting is not None:
                waiting.end()
        else:
            agree(rank.group, number, step="rounds")
    rank.barrier()
    until(lambda: is_no_more((*held(), threading.active_count()), before), f"{before} became {held()}")
    kept.close()


def is_no_more(now: tuple[int, ...], before: tuple[int, ...]) -> bool:
    """Of each kind by itself: a descriptor less does not make up for a thread more."""
    return all(n <= b for n, b in zip(now, before, strict=True))
