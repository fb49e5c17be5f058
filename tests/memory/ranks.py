"""Ranks as the memory tests use them: fresh processes for each test, which make their groups themselves.

`launch(n, body, ...)` runs `body(rank, n, store, ...)` in n processes, and says how each one ended. The store is a
file, so that it survives whichever rank a test kills, and so that no test waits for a name server: a TCPStore looks up
the name of everyone who connects, and stands still for 5 s when one answer is lost.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from common.ranks import PRELOADED as PRELOADED  # sets what ranks of a process have imported already
from mnnvl_ar.ranks import Rank, RankPool


@dataclass
class End:
    """How one rank ended: `value` it returned, `error` text, or the signal that killed it (`exitcode` below 0)."""

    value: Any = None
    error: str = ""
    exitcode: int = 0


def launch(world_size: int, body: Callable[..., Any], *arguments: Any, seconds: float = 60.0) -> list[End]:
    """Runs the ranks to their end; those still there after `seconds` are killed and say so in `error`."""
    with RankPool(world_size) as pool:
        outcomes = pool.start(_run, body, *arguments).outcomes(seconds, grace=math.inf)
        codes = pool.close()
    ends = zip(outcomes, codes, strict=True)
    return [End(value, "", code) if ok else End(None, value, code) for (ok, value), code in ends]


def _run(rank: Rank, body: Callable[..., Any], *arguments: Any) -> Any:
    return body(rank.rank, rank.world_size, rank.store, *arguments)


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


def descriptors() -> dict[int, str]:
    """What each of this process's descriptors leads to."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def _listening() -> int:
    """This process's sockets that wait for connections, unix or TCP. What others of this host hold is not counted."""
    ours = {*descriptors().values()}
    found = 0
    for table, state, listens, inode in (("unix", 3, "00010000", 6), ("tcp", 3, "0A", 9), ("tcp6", 3, "0A", 9)):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{table}") as lines:  # no tcp6 without IPv6
            rows = [line.split() for line in lines][1:]
            found += sum(row[state] == listens and f"socket:[{row[inode]}]" in ours for row in rows)
    return found
