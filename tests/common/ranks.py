"""The one launcher of ranks: persistent processes, one a rank, that run functions side by side.

    pool = rank_pool(4)                        # 4 host ranks; kept and shared until the end of the session
    sums = pool.run(function, argument, ...)   # [function(context, argument, ...) of each rank]

`function` is a top-level function; `context` is its rank's `Rank`. A run that fails on any rank raises `RanksFailed`,
which holds every failing rank's traceback. A rank that hangs or dies takes the pool's processes with it; the next run
starts new ones.

Processes fork from a server that has imported PyTorch, so that a rank costs milliseconds and not seconds. They have not
used CUDA then, and load mnnvl_ar themselves, so that each pool can have a library and an environment of its own.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tools.multicast import keep_multicast_off

ROOT = Path(__file__).parent.parent.parent
TEST_LIBRARY = ROOT / "tests" / "_C_test.so"
GRACE = 5.0  # seconds that the other ranks get once one has failed


class RanksFailed(AssertionError):
    """Ranks raised, died or hung. `problems`: text by rank."""

    def __init__(self, what: str, problems: dict[int, str]) -> None:
        self.problems = problems
        super().__init__(
            f"{what} on {len(problems)} ranks\n" + "\n".join(f"rank {r}: {p}" for r, p in sorted(problems.items()))
        )


class Rank:
    """What a function that runs on all ranks is given. See also `common.virtual_ranks.VirtualRank`, which is used
    alike.

    rank, world_size, device: of this rank; group: the gloo group of all ranks.
    """

    def __init__(self, rank: int, world_size: int, device: Any, group: Any) -> None:
        self.rank, self.world_size, self.device, self.group = rank, world_size, device, group
        self._workspaces: dict[str, Any] = {}

    def within(self, members: list[int]) -> Rank | None:
        """This rank among `members` alone, whose ranks are then 0, 1, ...; None if it is not one of them. Collective
        over all ranks."""
        import torch.distributed as dist

        group = dist.new_group(members)
        inside = self.rank in members
        return Rank(dist.get_rank(group), len(members), self.device, group) if inside else None

    def workspace(self, max_tokens: int = 64, hidden: int = 8192, dtype: Any = None, **options: Any) -> Any:
        """A `mnnvl_ar.Workspace` over all ranks, made on the first call with these arguments and kept."""
        key = repr((max_tokens, hidden, dtype, sorted(options.items())))
        if key not in self._workspaces:
            self._workspaces[key] = self.new_workspace(max_tokens, hidden, dtype, **options)
        return self._workspaces[key]

    def new_workspace(self, max_tokens: int = 64, hidden: int = 8192, dtype: Any = None, **options: Any) -> Any:
        """The same, but made anew; the caller closes it."""
        import torch

        import mnnvl_ar

        options = {"deadline": 20.0, "device": self.device, **options}
        return mnnvl_ar.Workspace(
            options.pop("group", self.group), max_tokens, hidden, dtype or torch.float32, **options
        )

    def set_epoch(self, workspace: Any, epoch: int) -> None:
        """Makes `epoch` the number of the next call. It must be the present one modulo 3, and the same on all ranks."""
        workspace._memory._block.driver.fill(workspace._memory.pointers[workspace.rank], 4, epoch)

    def forget_workspaces(self) -> None:
        """Closes the kept workspaces."""
        while self._workspaces:
            self._workspaces.popitem()[1].close()

    def barrier(self) -> None:
        import torch.distributed as dist

        self.synchronize()
        dist.barrier(self.group)

    def synchronize(self) -> None:
        """Waits for this rank's calls."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def capture(self, work: Callable[[], Any]) -> Any:
        """`work` captured on a side stream, as a CUDA graph that is ready to be replayed."""
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph


class RankPool:
    """`world_size` processes, each a rank of a gloo group on loopback; with device "cuda" each on the GPU of its rank.
    `with` one, it is a test's own: no other test's workspaces are in it, and all ranks are killed at the end.

    env: added to the processes' environment. library: the build of mnnvl_ar they load, the release one if None.
    """

    def __init__(
        self, world_size: int, device: str = "cpu", env: dict[str, str] | None = None, library: Path | None = None
    ) -> None:
        self.world_size, self.device = world_size, device
        self.env = dict(env or {})
        if library is not None:
            self.env["MNNVL_AR_LIBRARY"] = str(library)
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._meeting: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    @property
    def pids(self) -> list[int]:
        self._start()
        return [process.pid for process in self._processes]

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0, **named: Any) -> list[Any]:
        """`function(context, *arguments)` on every rank; results by rank. After `timeout` seconds the ranks are
        killed.
        """
        return self.start(function, *arguments, **named).results(timeout)

    def start(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Running:
        """Begins a run, for tests that do something to the ranks meanwhile."""
        self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments, named))
        return Running(self, function.__name__)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Sends one rank a signal."""
        process = self._processes[rank]
        os.kill(process.pid, number)
        if number == signal.SIGKILL:
            process.join()

    def close(self) -> None:
        """Lets idle ranks end by themselves, workspaces closed; kills those that do not."""
        for pipe in self._pipes:
            pipe.close()
        self._reap(10.0)

    def discard(self) -> None:
        """Kills all ranks."""
        for process in self._processes:
            process.kill()
        for pipe in self._pipes:
            pipe.close()
        self._reap(10.0)

    def _reap(self, patience: float) -> None:
        until = time.monotonic() + patience
        for process in self._processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []
        if self._meeting:
            self._meeting.cleanup()
            self._meeting = None

    def _start(self) -> None:
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        self.discard()
        self._meeting = tempfile.TemporaryDirectory(prefix="mnnvl_ar-ranks-")
        context = _forks()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            what = (theirs, self._meeting.name, rank, self.world_size, self.device, self.env)
            process = context.Process(target=_serve, args=what, daemon=True, name=f"rank {rank}")
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


class Running:
    """A run under way."""

    def __init__(self, pool: RankPool, name: str) -> None:
        self.pool, self.name = pool, name

    def results(self, timeout: float = 60.0) -> list[Any]:
        outcomes = self.outcomes(timeout)
        if problems := {rank: text for rank, (ok, text) in enumerate(outcomes) if not ok}:
            self.pool.discard()  # the others may hold workspaces that are broken now
            raise RanksFailed(f"{self.name} failed", problems)
        return [value for _, value in outcomes]

    def outcomes(self, timeout: float = 60.0) -> list[tuple[bool, Any]]:
        """(True, result) or (False, traceback or what became of the process), by rank."""
        waiting = dict(zip(self.pool._pipes, range(self.pool.world_size), strict=True))
        found: dict[int, tuple[bool, Any]] = {}
        until, lost = time.monotonic() + timeout, False
        while waiting:
            ready = wait(list(waiting), max(0.0, until - time.monotonic()))
            if not ready:
                lost = True
                for rank in waiting.values():
                    found[rank] = (
                        False,
                        f"still running after {timeout:.0f} s, or {GRACE:.0f} s after another rank's error",
                    )
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    found[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    process = self.pool._processes[rank]
                    process.join(1.0)
                    found[rank] = (False, f"process ended with exit code {process.exitcode}")
                    lost = True
                if not found[rank][0]:
                    until = min(until, time.monotonic() + GRACE)
        if lost:
            self.pool.discard()
        return [found[rank] for rank in range(self.pool.world_size)]


_pools: dict[Any, RankPool] = {}
_lock = threading.Lock()


def rank_pool(
    world_size: int, device: str = "cpu", *, library: Path | None = None, env: dict[str, str] | None = None
) -> RankPool:
    """The session's pool of this kind. `close_pools` ends them all."""
    key = (world_size, device, library, tuple(sorted((env or {}).items())))
    with _lock:
        if key not in _pools:
            _pools[key] = RankPool(world_size, device, env, library)
        return _pools[key]


def close_pools() -> None:
    """Ends every pool made by `rank_pool`."""
    with _lock:
        for pool in _pools.values():
            pool.close()
        _pools.clear()


@functools.cache
def _forks() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    return context


def _serve(pipe: Connection, meeting: str, rank: int, world_size: int, device: str, env: dict[str, str]) -> None:
    """A rank's life: runs what comes down the pipe until it is closed."""
    os.environ.update(env)
    keep_multicast_off()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    sys.path[:0] = [str(ROOT)]
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{meeting}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    context = Rank(rank, world_size, where, dist.group.WORLD)
    while True:
        try:
            function, arguments, named = pipe.recv()
        except (EOFError, ConnectionResetError):
            break
        try:
            outcome = (True, function(context, *arguments, **named))
        except BaseException:
            outcome = (False, traceback.format_exc())
        try:
            pipe.send(outcome)
        except (BrokenPipeError, ConnectionResetError):
            break
    context.forget_workspaces()
    if dist.is_initialized():
        dist.destroy_process_group()
