"""How the ranks of a group meet: once, through the store that the group was made with, then over sockets of their own.

No collective runs on the group, so it may be gloo, NCCL or anything else, a subgroup of whatever, with a communicator
not even initialised; and nothing of what other users of the group do can be put out of step (pytorch#196082).

Rank 0 opens a listener and writes its address under one key of the group's store, over whatever an earlier bring-up
left there. The others connect: over an abstract unix socket on rank 0's host, over TCP from another host. A stale
address leads to a closed listener, so a rank simply reads the key again; no counter needs to agree. A random token
keeps strangers out.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import BringUpError
from . import hosts
from .line import Line, LineClosed
from .vote import Ballot, Failure, Hub, Spoke, lost

STEP = "rendezvous"
_KEY = "mnnvl_ar/hub"
_TICK = 0.02
_T = TypeVar("_T")


def meet(group: dist.ProcessGroup, timeout: float) -> Ballot:
    """Connects all ranks of `group`. Collective. `BringUpError` names who did not come."""
    deadline = time.monotonic() + timeout
    rank, size = group.rank(), group.size()
    if size == 1:
        return Hub({}, size, timeout, deadline)
    store = _Mailbox(group, deadline)
    if rank == 0:
        return _Host(store, size, timeout, deadline).gather()
    return _join(store, rank, size, timeout, deadline)


class _Mailbox:
    """The group's store, each access bounded: a store whose host is stopped would block for ever inside C++."""

    def __init__(self, group: dist.ProcessGroup, deadline: float) -> None:
        self._store, self._deadline = _store_of(group), deadline

    def put(self, key: str, value: str) -> None:
        self._bounded(lambda: self._store.set(key, value))

    def get(self, key: str) -> str | None:
        return self._bounded(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def _bounded(self, call: Callable[[], _T]) -> _T:
        box: list[Any] = []

        def run() -> None:
            try:
                box.append((call(), None))
            except Exception as error:
                box.append((None, error))

        thread = threading.Thread(target=run, daemon=True, name="mnnvl_ar-store")
        thread.start()
        thread.join(max(self._deadline - time.monotonic(), 0.0))
        advice = "The process that hosts it (torchrun's agent, or the first rank) is gone, stopped or out of reach."
        if not box:
            raise BringUpError(-1, STEP, "the process group's store does not answer", advice)
        value, error = box[0]
        if error is not None:
            raise BringUpError(-1, STEP, f"the process group's store failed: {error}", advice) from error
        return value  # type: ignore[no-any-return]


def _store_of(group: dist.ProcessGroup) -> Any:
    try:
        return group.get_group_store()
    except (AttributeError, RuntimeError):
        pass
    try:  # older PyTorch
        return dist.distributed_c10d._world.pg_map[group][1]
    except (AttributeError, KeyError) as error:
        raise BringUpError(
            group.rank(), STEP, "this process group has no store", "Make it with torch.distributed.new_group."
        ) from error


class _Host:
    """Rank 0 while the others arrive."""

    def __init__(self, store: _Mailbox, size: int, timeout: float, deadline: float) -> None:
        self._store, self._size, self._timeout = store, size, timeout
        self._margin = min(2.0, 0.1 * timeout)  # decide before the others stop listening
        self._deadline = deadline - self._margin
        self._name, self._token = secrets.token_hex(8), secrets.token_hex(16)
        self._listeners = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)]
        self._strangers: set[Line] = set()  # connected, not yet introduced
        self._lines: dict[int, Line] = {}
        self._selector = selectors.PollSelector()

    def gather(self) -> Hub:
        done = False
        try:
            self._listen(self._listeners[0], f"\0mnnvl_ar-{self._name}")
            self._publish([])
            while len(self._lines) < self._size - 1:
                if time.monotonic() > self._deadline:
                    missing = [r for r in range(1, self._size) if r not in self._lines]
                    self._fail(Hub({}, self._size, self._timeout, 0).silent(missing, STEP))
                self._tick()
            for rank, line in self._lines.items():
                try:
                    line.send({"welcome": True}, time.monotonic() + 1.0)
                except OSError:
                    self._fail(lost(rank, STEP))
            done = True
            return Hub(self._lines, self._size, self._timeout, self._deadline)
        finally:
            self._selector.close()
            for closing in (*self._listeners, *self._strangers, *(() if done else self._lines.values())):
                closing.close()

    def _listen(self, sock: socket.socket, address: Any) -> None:
        sock.bind(address)
        sock.listen(self._size)
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ)

    def _publish(self, tcp: list[tuple[str, int]]) -> None:
        about = {"name": self._name, "token": self._token, "host": hosts.identity(), "tcp": tcp}
        self._store.put(_KEY, json.dumps(about))

    def _tick(self) -> None:
        ready = self._selector.select(_TICK * 2)
        if not ready and len(self._listeners) == 1 and self._store.get(f"{_KEY}/tcp") == self._name:
            self._open_tcp()
        for key, _ in ready:
            if isinstance(key.fileobj, socket.socket):
                try:
                    sock = key.fileobj.accept()[0]
                    if sock.family != socket.AF_UNIX:
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    line = Line(sock)
                except OSError:
                    continue
                self._strangers.add(line)
                self._selector.register(line, selectors.EVENT_READ)
            elif isinstance(key.fileobj, Line):
                self._hear(key.fileobj)

    def _open_tcp(self) -> None:
        """A rank of another host asked for it. Ranks of one host never make us open a port."""
        both = socket.has_dualstack_ipv6()
        sock = socket.socket(socket.AF_INET6 if both else socket.AF_INET, socket.SOCK_STREAM)
        self._listeners.append(sock)
        if both:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._listen(sock, ("::" if both else "0.0.0.0", 0))
        self._publish([(address, sock.getsockname()[1]) for address in hosts.addresses()])

    def _hear(self, line: Line) -> None:
        rank = next((r for r, known in self._lines.items() if known is line), None)
        try:
            got = line.poll()
            if got is None:
                return
            hello = got[0]
            if rank is not None or hello.get("token") != self._token or hello.get("rank") not in range(1, self._size):
                raise LineClosed("a stranger")
            line.send({"heard": True}, time.monotonic() + 1.0)
        except OSError:
            self._selector.unregister(line)
            self._strangers.discard(line)
            line.close()
            if rank is not None:
                del self._lines[rank]
                self._fail(lost(rank, STEP))
            return
        self._strangers.discard(line)
        self._lines[hello["rank"]] = line
        self._deadline = min(self._deadline, time.monotonic() + hello["seconds_left"] - self._margin)

    def _fail(self, failure: Failure) -> None:
        about = {"rank": failure.rank, "cause": failure.cause, "advice": failure.advice}
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.send(about, time.monotonic() + 1.0)
        raise BringUpError(failure.rank, STEP, failure.cause, failure.advice)


def _join(store: _Mailbox, rank: int, size: int, timeout: float, deadline: float) -> Spoke:
    """A rank other than 0: finds the hub, introduces itself, waits until all are there."""
    me, asked, pause = hosts.identity(), "", 0.001
    while time.monotonic() < deadline:
        text = store.get(_KEY)
        about = json.loads(text) if text else None
        if about is not None:
            line = None
            if about["host"] == me:
                line = _introduce(socket.AF_UNIX, f"\0mnnvl_ar-{about['name']}", about, rank, deadline)
            elif not about["tcp"] and asked != about["name"]:
                store.put(f"{_KEY}/tcp", about["name"])
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
    failure = Spoke(None, rank, size, timeout, 0).silent([0], STEP)  # type: ignore[arg-type]
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
        failure = spoke.silent([0], STEP)
    except OSError:
        failure = lost(0, STEP)
    if failure is None:
        return spoke
    line.close()
    raise BringUpError(failure.rank, STEP, failure.cause, failure.advice)
