"""Starts real processes as the ranks of a group, over loopback, and says how each one ended.

`launch(n, body, ...)` runs `body(rank, n, store, ...)` in n fresh processes. The store is a file, so that it survives
whichever rank a test kills, and so that no test waits for a name server: a TCPStore looks up the name of everyone who
connects, and stands still for 5 s when one answer is lost. Processes fork from a server that has imported PyTorch once:
a launch costs tens of milliseconds, which is what makes hundreds of them affordable.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
# There is one fork server a process, so this is as in common/ranks.py, whose ranks choose their library themselves.
_context.set_forkserver_preload(["torch", "torch.distributed"])
_lock = threading.Lock()  # multiprocessing reads an exit code twice if threads start and join at once


@dataclass
class End:
    """How one rank ended: `value` it returned, `error` text, or the signal that killed it (`exitcode` below 0)."""

    value: Any = None
    error: str = ""
    exitcode: int | None = 0


def launch(world_size: int, body: Callable[..., Any], *arguments: Any, seconds: float = 60.0) -> list[End]:
    """Runs the ranks to their end; those still there after `seconds` are killed and say so in `error`."""
    with tempfile.TemporaryDirectory(prefix="mnnvl_ar-ranks-") as meeting:
        return _launch(world_size, body, arguments, seconds, meeting)


def _launch(
    world_size: int, body: Callable[..., Any], arguments: tuple[Any, ...], seconds: float, meeting: str
) -> list[End]:
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        what = (theirs, meeting, rank, world_size, body, arguments)
        process = _context.Process(target=_main, args=what, daemon=True)
        with _lock:
            process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    ends = [End(error="no result") for _ in range(world_size)]
    deadline, open_pipes = time.monotonic() + seconds, {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes:
        ready = wait(list(open_pipes), max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            with contextlib.suppress(EOFError):  # killed
                ends[rank] = pipe.recv()
    for rank, process in enumerate(processes):
        if not wait([process.sentinel], max(deadline - time.monotonic(), 1.0)):
            ends[rank].error += f"; rank {rank} did not exit within {seconds} s"
            process.kill()
            wait([process.sentinel])
        with _lock:
            process.join()
            ends[rank].exitcode = process.exitcode
    for pipe in pipes:
        pipe.close()
    return ends


def values(ends: list[End]) -> list[Any]:
    """What the ranks returned; fails the test, with their tracebacks, if one did not return."""
    bad = [(rank, end) for rank, end in enumerate(ends) if end.error or end.exitcode]
    problems = [f"rank {rank}: {end.error or end.exitcode}" for rank, end in bad]
    assert not problems, "\n".join(problems)
    return [end.value for end in ends]


def group(store: dist.Store, name: str, rank: int, world_size: int) -> dist.ProcessGroup:
    """Makes the default group of this process anew, over gloo."""
    if dist.is_initialized():
        dist.destroy_process_group()
    inner = dist.PrefixStore(name, store)
    dist.init_process_group("gloo", store=inner, rank=rank, world_size=world_size, timeout=timedelta(seconds=30))
    world = dist.group.WORLD
    assert world is not None
    return world


def meet(store: dist.Store, name: str, world_size: int) -> None:
    """A barrier that does not use any process group. `name` must be new."""
    store.add(name, 1)
    while store.add(name, 0) < world_size:
        time.sleep(0.002)


def census() -> dict[str, int]:
    """What this process holds and could leak."""
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd:" in line for line in maps)
    with open("/proc/self/status") as status:
        size = re.search(r"VmSize:\s+(\d+) kB", status.read())
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "mapped": mapped,
        "threads": len(os.listdir("/proc/self/task")),
        "sockets": _listening(),
        "MiB": int(size[1]) >> 10 if size else 0,
    }


def _listening() -> int:
    """This process's sockets that wait for connections, unix or TCP. What others of this host hold is not counted."""
    ours = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            ours.add(os.readlink(f"/proc/self/fd/{fd}"))
    found = 0
    for table, state, listens, inode in (("unix", 3, "00010000", 6), ("tcp", 3, "0A", 9), ("tcp6", 3, "0A", 9)):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{table}") as lines:  # no tcp6 without IPv6
            rows = [line.split() for line in lines][1:]
            found += sum(row[state] == listens and f"socket:[{row[inode]}]" in ours for row in rows)
    return found


def _main(pipe: Connection, meeting: str, rank: int, world_size: int, body: Callable[..., Any], arguments: Any) -> None:
    try:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.FileStore(f"{meeting}/store", world_size)
        pipe.send(End(value=body(rank, world_size, store, *arguments)))
    except BaseException:
        pipe.send(End(error=traceback.format_exc()))
    finally:
        pipe.close()
        if dist.is_initialized():
            dist.destroy_process_group()
