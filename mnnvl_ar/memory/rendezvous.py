"""How the ranks of a group meet: once, through the store that the group was made with, then over sockets of their own.

No collective runs on the group, so it may be gloo, NCCL or anything else, a subgroup of whatever, with a communicator
not even initialised; and nothing of what other users of the group do can be put out of step (pytorch#196082).

Rank 0 opens a listener and writes its address under one key of the group's store, over whatever an earlier bring-up
left there. The others connect: over an abstract unix socket on rank 0's host, over TCP from another host. A stale
address leads to a closed listener, so a rank simply reads the key again; no counter needs to agree. A random token
keeps strangers out.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import torch.distributed as dist

from ..errors import BringUpError
from . import hosts
from .line import Line
from .mailbox import STEP, Mailbox
from .reception import KEY, Reception
from .vote import Ballot, Failure, Hub, Spoke, lost, silent

_TICK = 0.02


def meet(group: dist.ProcessGroup, timeout: float) -> Ballot:
    """Connects all ranks of `group`. Collective. `BringUpError` names who did not come."""
    deadline = time.monotonic() + timeout
    rank, size = group.rank(), group.size()
    if size == 1:
        return Hub({}, size, timeout, deadline)
    store = Mailbox(group, deadline)
    if rank == 0:
        return Reception(store, size, timeout, deadline).gather()
    return _join(store, rank, size, timeout, deadline)


def _join(store: Mailbox, rank: int, size: int, timeout: float, deadline: float) -> Spoke:
    """A rank other than 0: finds the hub, introduces itself, waits until all are there."""
    me, asked, pause = hosts.identity(), "", 0.001
    while time.monotonic() < deadline:
        text = store.get(KEY)
        about = json.loads(text) if text else None
        if about is not None:
            line = None
            if about["host"] == me:
                line = _introduce(socket.AF_UNIX, f"\0mnnvl_ar-{about['name']}", about, rank, deadline)
            elif not about["tcp"] and asked != about["name"]:
                store.put(f"{KEY}/tcp", about["name"])
                asked = about["name"]
            for address, port in about["tcp"] if line is None and about["host"] != me else ():
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                line = _introduce(family, (address, port), about, rank, deadline)
                if line is not None:
                    break
            if line is not None:
                return _welcomed(line, rank, size, timeout, deadline)
        time.sleep(pause)
        pause = min(pause * 1.5, _TICK)
    failure = silent([0], STEP, timeout)
    raise BringUpError(failure.rank, STEP, failure.cause, failure.advice)


def _introduce(family: int, address: Any, about: dict[str, Any], rank: int, deadline: float) -> Line | None:
    """A line to the hub, or None if nobody of ours listens there (any more)."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    left = max(deadline - time.monotonic(), 0.001)
    sock.settimeout(min(left, 2.0))
    try:
        sock.connect(address)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        sock.close()
        return None
    line = Line(sock)
    try:
        line.send({"token": about["token"], "rank": rank, "seconds_left": left}, deadline)
        line.receive(min(deadline, time.monotonic() + 10.0))
    except OSError:
        line.close()
        return None
    return line


def _welcomed(line: Line, rank: int, size: int, timeout: float, deadline: float) -> Spoke:
    spoke = Spoke(line, rank, size, timeout, deadline)
    failure: Failure | None
    try:
        message, _ = line.receive(deadline)
        failure = None if "welcome" in message else Failure(message["rank"], STEP, message["cause"], message["advice"])
    except TimeoutError:
        failure = silent([0], STEP, timeout)
    except OSError:
        failure = lost(0, STEP)
    if failure is None:
        return spoke
    line.close()
    raise BringUpError(failure.rank, STEP, failure.cause, failure.advice)
