"""Rank 0 while the others arrive: it listens, says where, and waits until every rank has introduced itself."""

from __future__ import annotations

import contextlib
import json
import secrets
import selectors
import socket
import time
from typing import Any

from ..errors import BringUpError
from . import hosts
from .line import Line, LineClosed
from .mailbox import STEP, Mailbox
from .vote import Failure, Hub, lost, silent

KEY = "mnnvl_ar/hub"
_TICK = 0.04


class Reception:
    """Rank 0 while the others arrive."""

    def __init__(self, store: Mailbox, size: int, timeout: float, deadline: float) -> None:
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
                    missing = [rank for rank in range(1, self._size) if rank not in self._lines]
                    self._fail(silent(missing, STEP, self._timeout))
                self._tick()
            for rank, line in self._lines.items():
                try:
                    line.send({"welcome": True}, time.monotonic() + 1.0)
                except OSError:
                    self._fail(lost(rank, STEP))
            done = True
            return Hub(self._lines, self._size, self._timeout, self._deadline, self._margin)
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
        self._store.put(KEY, json.dumps(about))

    def _tick(self) -> None:
        ready = self._selector.select(_TICK)
        if not ready and len(self._listeners) == 1 and self._store.get(f"{KEY}/tcp") == self._name:
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
