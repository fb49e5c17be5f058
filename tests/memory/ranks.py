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


class Census(dict[str, int]):
    """What this process holds and could leak, by kind. descriptors: what each of them leads to."""

    def __init__(self, counts: dict[str, int], descriptors: dict[int, str]) -> None:
        super().__init__(counts)
        self.descriptors = descriptors

    def opened_since(self, before: Census) -> list[str]:
        """Descriptors that have come, or lead elsewhere; of sockets, what the kernel says of them."""
        new = {fd: at for fd, at in self.descriptors.items() if before.descriptors.get(fd) != at}
        return [f"{fd}: {at} {_sockets().get(at, '')}".strip() for fd, at in new.items()]


def census() -> Census:
    descriptors = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            descriptors[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd:" in line for line in maps)
    with open("/proc/self/status") as status:
        size = re.search(r"VmSize:\s+(\d+) kB", status.read())
    counts = {
        "fds": len(descriptors),
        "mapped": mapped,
        "threads": len(os.listdir("/proc/self/task")),
        "sockets": sum(_listens(line) for at, line in _sockets().items() if at in descriptors.values()),
        "MiB": int(size[1]) >> 10 if size else 0,
    }
    return Census(counts, descriptors)


def _sockets() -> dict[str, str]:
    """Lines of the kernel's tables of unix and TCP sockets, this process's and others', by what a descriptor leads
    to."""
    found = {}
    for table, inode in (("unix", 6), ("tcp", 9), ("tcp6", 9)):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{table}") as lines:  # no tcp6 without IPv6
            for line in [*lines][1:]:
                found[f"socket:[{line.split()[inode]}]"] = f"{table} {line.strip()}"
    return found


def _listens(line: str) -> bool:
    """Of such a line: whether it waits for connections."""
    table, *row = line.split()
    return row[3] == {"unix": "00010000", "tcp": "0A", "tcp6": "0A"}[table]
