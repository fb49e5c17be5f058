"""The one launcher of ranks: processes of this machine that form a group, and run functions side by side.

A server starts its ranks by itself, or torchrun does, and then this is not needed. It is for trying things out, and
what tests, demo, doctor and bench stand on. A first call on a laptop, as a file of its own:

    import torch
    from mnnvl_ar import Workspace, ops
    from mnnvl_ar.ranks import Rank, RankPool

    def add(rank: Rank) -> float:
        with Workspace(rank.join(), max_tokens=1, hidden=64, dtype=torch.bfloat16, device=rank.device) as workspace:
            x = torch.full((1, 64), 1.0 + rank.rank, dtype=torch.bfloat16, device=rank.device)
            return ops.all_reduce(x, workspace.handle)[0, 0].item()

    if __name__ == "__main__":  # since ranks import this file too
        with RankPool(2) as pool:  # on the host; RankPool(2, "cuda") is on the first two GPUs
            print(pool.run(add))  # [3.0, 3.0]

What it promises: a run ends within its time limit, whatever its ranks do (but one that is stopped while it sends a
reply that no pipe holds, which is waited for), and says of each rank what it returned, what it raised, or how it ended.
No rank outlives the process that started it. Ctrl-C goes to that process alone, and its `with` ends the ranks. A rank
costs milliseconds, not the seconds of importing PyTorch: all are forked from one server (multiprocessing's fork server)
that has done so. The server has not used CUDA, so each rank may.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

GRACE = 5.0  # seconds that the other ranks get once one has failed
_PATIENCE = 10.0  # seconds that idle ranks get to end by themselves

# What the fork server imports, once, before the first rank. Not mnnvl_ar: each pool may have a library of its own.
# Tests add what their functions import.
_PRELOADED = ["torch", "torch.distributed"]

_lock = threading.Lock()  # multiprocessing reads an exit code twice if threads start, poll and join at once


class RanksFailed(RuntimeError):
    """Ranks raised, died or hung. `problems`: text by rank, of the first to fail first."""

    def __init__(self, what: str, problems: dict[int, str]) -> None:
        self.problems = problems
        super().__init__(
            f"{what} on {len(problems)} ranks\n" + "\n".join(f"rank {r}: {p}" for r, p in sorted(problems.items()))
        )


class Outcome(NamedTuple):
    """How a run ended on one rank. `value`: what the function returned; if not `ok`, a text: its traceback, or what
    became of the process."""

    ok: bool
    value: Any


class _Told(NamedTuple):
    message: Any


class Rank:
    """What functions are given first: this process's place among the ranks.

    rank, world_size: from 0, and of how many. device: its GPU, which is the current one, or the CPU. store: a
    torch.distributed store that all ranks share; a file, so it outlives each of them.
    """

    def __init__(self, rank: int, world_size: int, device: str, store: FileStore, pipe: Connection) -> None:
        self.rank, self.world_size, self.store, self._pipe = rank, world_size, store, pipe
        self.device = torch.device(device, rank) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(self.device)

    def join(self, timeout: float = 1800.0) -> dist.ProcessGroup:
        """This process's default group: of all ranks, over gloo. The first call makes it, and is collective; what waits
        for another rank in it raises after `timeout` seconds."""
        if not dist.is_initialized():
            limit, size = timedelta(seconds=timeout), self.world_size
            dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=size, timeout=limit)
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    def tell(self, message: Any) -> None:
        """Sends `message` to whoever waits for the run, whose time limit begins anew."""
        self._pipe.send(_Told(message))

    def close(self) -> None:
        """The last thing that a rank does when its pool is closed."""
        if dist.is_initialized():
            dist.destroy_process_group()


class RankPool:
    """`world_size` processes, each a rank on loopback; with device "cuda" each on the GPU of its rank. They start with
    the first run, and stay. After a run in which one died or hung, the next run starts all of them anew.

    env: added to the environment that ranks take over from this process. It is set before they import anything of
    mnnvl_ar, so that MNNVL_AR_LIBRARY can name another build of the library.

    `with` a pool: its ranks have ended afterwards. They are killed if the `with` is left by an exception.
    """

    rank_type: type[Rank] = Rank  # for a pool whose functions are given more: a subclass of `Rank`

    def __init__(self, world_size: int, device: str = "cpu", env: Mapping[str, str] | None = None) -> None:
        self.world_size, self.device, self.env = world_size, device, dict(env or {})
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._running: Running | None = None
        self._meeting: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    @property
    def pids(self) -> list[int]:
        if not self._processes:
            self._start()
        return [process.pid for process in self._processes]

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0, **named: Any) -> list[Any]:
        """`function(rank, *arguments, **named)` on every rank, `rank` a `Rank`; what they return, by rank. `function`
        is a top-level one of a module, or of the script, that ranks can import too.

        Raises `RanksFailed` if a rank raises, dies, or still runs after `timeout` seconds, or `GRACE` seconds after
        another rank failed. All ranks are killed then.
        """
        return self.start(function, *arguments, **named).results(timeout)

    def start(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Running:
        """Begins a run, for callers that do something meanwhile. A run under way is given up, and its ranks killed."""
        if self._running is not None and not self._running.is_over:
            self.discard()
        with _lock:
            alive = [process.is_alive() for process in self._processes]
        if not all(alive):
            self.discard()
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died, which the run will tell
                pipe.send((function, arguments, named))
        self._running = Running(self, function.__name__)
        return self._running

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Sends one rank a signal. After SIGKILL it has ended when this returns."""
        process = self._processes[rank]
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        if number == signal.SIGKILL:
            _exit_code(process, 0.0)

    def close(self) -> list[int]:
        """Lets idle ranks end by themselves, groups closed; kills those that do not within ten seconds. Exit codes by
        rank, of a signal its number below 0."""
        for pipe in self._pipes:
            pipe.close()
        until = time.monotonic() + _PATIENCE
        codes = [_exit_code(process, until - time.monotonic()) for process in self._processes]
        self._processes, self._pipes, self._running = [], [], None
        if self._meeting:
            self._meeting.cleanup()
            self._meeting = None
        return codes

    def discard(self) -> None:
        """Kills all ranks."""
        for process in self._processes:
            process.kill()
        self.close()

    def _start(self) -> None:
        self._meeting = tempfile.TemporaryDirectory(prefix="mnnvl_ar-ranks-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        environment = {**os.environ, **self.env}
        try:
            with _whole():
                _start_server()
                for rank in range(self.world_size):
                    ours, theirs = context.Pipe()
                    what = (theirs, self._meeting.name, self.rank_type, rank, self.world_size, self.device)
                    name = _Name(f"rank {rank}", environment)
                    process = context.Process(target=_serve, args=what, daemon=True, name=name)
                    with _lock:
                        process.start()
                    theirs.close()
                    self._processes.append(process)
                    self._pipes.append(ours)
        except BaseException:
            self.discard()
            raise


class Running:
    """A run under way. ended: the outcomes so far, by rank, of the first to end first."""

    def __init__(self, pool: RankPool, name: str) -> None:
        self.pool, self.name, self.ended = pool, name, dict[int, Outcome]()
        self._waiting = {pipe: rank for rank, pipe in enumerate(pool._pipes)}

    @property
    def is_over(self) -> bool:
        return not self._waiting

    def results(
        self,
        timeout: float = 60.0,
        *,
        grace: float = GRACE,
        heard: Callable[[int, Any], object] = lambda *_: None,
    ) -> list[Any]:
        """As `RankPool.run`; `outcomes` explains the arguments."""
        outcomes = self.outcomes(timeout, grace=grace, heard=heard)
        if problems := {rank: outcome.value for rank, outcome in self.ended.items() if not outcome.ok}:
            self.pool.discard()  # the others may hold workspaces that are broken now
            raise RanksFailed(f"{self.name} failed", problems)
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self,
        timeout: float = 60.0,
        *,
        grace: float = GRACE,
        heard: Callable[[int, Any], object] = lambda *_: None,
    ) -> list[Outcome]:
        """How each rank ended, by rank. Killed are those that still run `timeout` seconds after this was called or a
        rank told something last, or `grace` seconds after another rank failed.

        heard: called with the rank and the message of each `Rank.tell`.
        """
        until, failed = time.monotonic() + timeout, False
        try:
            while not self.is_over:
                told = self.wait(until - time.monotonic())
                if told is None:
                    break
                for message in told:
                    heard(*message)
                if told and not failed:
                    until = time.monotonic() + timeout
                if not failed and not all(outcome.ok for outcome in self.ended.values()):
                    failed, until = True, min(until, time.monotonic() + grace)
            after = f"{grace:.0f} s after another rank's error" if failed else f"after {timeout:.0f} s"
            for rank in self._waiting.values():
                self.pool.kill(rank)
                self.ended[rank] = Outcome(False, f"still running {after}")
            self._waiting.clear()
        except BaseException:  # nobody waits for this run any more
            self.pool.discard()
            raise
        return [self.ended[rank] for rank in range(self.pool.world_size)]

    def wait(self, seconds: float) -> list[tuple[int, Any]] | None:
        """Waits until something comes from a rank. Its outcome is in `ended` then; what ranks told is returned as
        (rank, message). None if nothing has come within `seconds`."""
        ready = wait(list(self._waiting), max(0.0, seconds))
        told = []
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = self._waiting[pipe]
            try:
                came = pipe.recv()
            except (EOFError, OSError):  # at the beginning of a message, or in it
                code = _exit_code(self.pool._processes[rank], 1.0)
                came = Outcome(False, f"process ended with exit code {code}")
            if isinstance(came, _Told):
                told.append((rank, came.message))
            else:
                del self._waiting[pipe]
                self.ended[rank] = came
        return told if ready else None


class _Name(str):
    """A process's name, which sets the process's environment where it is unpickled, and makes it deaf to Ctrl-C.

    mnnvl_ar loads its library when it is imported, so MNNVL_AR_LIBRARY must be set before that. But a new process
    imports mnnvl_ar before any code of ours runs in it: to find `_serve`, and before that with the script that the
    parent runs as `__main__`, which multiprocessing imports into every child. Ahead of both it unpickles a few facts
    about itself, the name among them, and what is pickled may ask for a call. This one asks for `eval`, which needs no
    import. A target of the standard library, to set the environment and then import ours, would come after the script;
    a server of our own would have to do again what multiprocessing's does well.
    """

    environment: dict[str, str]

    def __new__(cls, name: str, environment: dict[str, str]) -> _Name:
        self = super().__new__(cls, name)
        self.environment = environment
        return self

    def __reduce__(self) -> Any:
        environ = "__import__('os').environ"
        deaf = "__import__('signal').pthread_sigmask(block, {interrupt})"
        source = f"{environ}.clear() or {environ}.update(environment) or ({deaf}, name)[1]"
        numbers = {"block": int(signal.SIG_BLOCK), "interrupt": int(signal.SIGINT)}
        return eval, (source, {"environment": self.environment, "name": str(self), **numbers})


def _exit_code(process: Any, patience: float) -> int:
    """Of a process that is ending, and is killed if it has not ended within `patience` seconds."""
    if not wait([process.sentinel], max(0.0, patience)):
        process.kill()
        wait([process.sentinel])
    with _lock:
        process.join()
        return int(process.exitcode)


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: a start that is cut short leaves a rank that nobody knows of. Only handlers that Python
    calls cut anything short, and it calls them in the main thread."""
    came: list[signal.Signals] = []
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = [signal.signal(number, lambda number, _: came.append(signal.Signals(number))) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


def _start_server() -> None:
    """Starts what ranks are forked from, if it does not run. It and they are deaf to Ctrl-C, which a terminal sends to
    all processes: only this one answers, and ends the others."""
    resource_tracker.ensure_running()  # which would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, meeting: str, rank_type: type[Rank], number: int, world_size: int, device: str) -> None:
    """A rank's life: runs what comes down the pipe until it is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rank: Rank | None = None
    while True:
        try:
            call = pipe.recv_bytes()
        except (EOFError, ConnectionResetError):
            break
        try:
            function, arguments, named = pickle.loads(call)
            if rank is None:
                rank = rank_type(number, world_size, device, FileStore(f"{meeting}/store", world_size), pipe)
            reply = ForkingPickler.dumps(Outcome(True, function(rank, *arguments, **named)))
        except BaseException:
            reply = ForkingPickler.dumps(Outcome(False, traceback.format_exc()))
        sys.stdout.flush()  # a rank that is killed later has printed what it did
        sys.stderr.flush()
        try:
            pipe.send_bytes(reply)
        except (BrokenPipeError, ConnectionResetError):
            break
    if rank is not None:
        rank.close()


def _end_with_parent() -> None:
    """A parent that was killed cannot end its ranks."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(2)
