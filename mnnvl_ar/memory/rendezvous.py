"""How the ranks of a group connect: rank 0 listens and makes its address known, the others connect to it.

A rank of rank 0's host connects over an abstract unix socket (file descriptors can be passed there), a rank of another
host over TCP, which is opened only if there is such a rank. An address that an earlier bring-up left leads to a
closed listener, so a rank simply looks again; no counter needs to agree. A random token keeps strangers out.

    rank r  ->  rank 0    {token, rank, seconds_left}     introduces itself
    rank 0  ->  rank r    {heard}                         this listener is the right one
    rank 0  ->  rank r    {welcome}, or {rank, cause, advice}     all ranks are connected, or why not
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import time
from dataclasses import replace
from typing import Any

from . import hosts
from .connection import Connection, ConnectionClosed
from .failures import Failure, lost, silent
from .group import Members
from .place import STEP, Address, Place, place_of
from .vote import Coordinator, Participant, Voter

_LISTEN_SECONDS, _LOOK_SECONDS = 0.04, 0.02  # between two looks at the place, on rank 0 and on the others


def meet(members: Members, timeout: float) -> Voter:
    """Connects all ranks of a group within `timeout` seconds. Collective. `BringUpError` names who did not come."""
    place = place_of(members, timeout)
    if place.size == 1:
        return Coordinator({}, 1, timeout, place.deadline)
    return Listener(place, timeout).gather() if place.rank == 0 else _join(place, timeout)


class Listener:
    """Rank 0 until every rank has introduced itself."""

    def __init__(self, place: Place, timeout: float) -> None:
        self._place, self._size, self._timeout = place, place.size, timeout
        self._margin = min(2.0, 0.1 * timeout)  # decide before the others stop waiting
        self._address = Address(secrets.token_hex(8), secrets.token_hex(16), hosts.identity(), [])
        self._listeners: list[socket.socket] = []
        self._tcp: socket.socket | None = None  # bound; one of the listeners only once it is needed
        self._strangers: set[Connection] = set()  # connected, not yet introduced
        self._peers: dict[int, Connection] = {}
        self._selector = selectors.PollSelector()

    def gather(self) -> Coordinator:
        done = False
        try:
            self._begin()
            self._deadline = self._place.deadline - self._margin
            while len(self._peers) < self._size - 1:
                if time.monotonic() > self._deadline:
                    missing = [rank for rank in range(1, self._size) if rank not in self._peers]
                    self._fail(silent(missing, STEP, self._timeout))
                self._serve()
            for rank, connection in self._peers.items():
                try:
                    connection.send({"welcome": True}, time.monotonic() + 1.0)
                except OSError:
                    self._fail(lost(rank, STEP))
            done = True
            return Coordinator(self._peers, self._size, self._timeout, self._deadline, self._margin)
        finally:
            self._selector.close()
            sockets = (*self._listeners, *(() if self._tcp is None else (self._tcp,)))
            for closing in (*sockets, *self._strangers, *(() if done else self._peers.values())):
                closing.close()

    def _begin(self) -> None:
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listeners.append(sock)
            sock.bind(self._address.unix)
            self._listen(sock)
            if self._place.once:
                self._bind_tcp()
        except OSError as error:
            failure = Failure(0, STEP, f"cannot listen: {error}")
            self._place.give_up(failure)
            raise failure.error() from error
        self._place.publish(self._address)

    def _listen(self, sock: socket.socket) -> None:
        sock.listen(self._size)
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ)

    def _serve(self) -> None:
        ready = self._selector.select(_LISTEN_SECONDS)
        if not ready and len(self._listeners) == 1 and self._place.asked_for_tcp(self._address):
            self._open_tcp()
        for key, _ in ready:
            if isinstance(key.fileobj, socket.socket):
                self._accept(key.fileobj)
            elif isinstance(key.fileobj, Connection):
                self._receive(key.fileobj)

    def _bind_tcp(self) -> socket.socket:
        """A port of ours, and its address; nobody can connect yet."""
        both = socket.has_dualstack_ipv6()
        self._tcp = sock = socket.socket(socket.AF_INET6 if both else socket.AF_INET, socket.SOCK_STREAM)
        if both:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::" if both else "0.0.0.0", 0))
        port = sock.getsockname()[1]
        self._address = replace(self._address, tcp=[(address, port) for address in hosts.addresses()])
        return sock

    def _open_tcp(self) -> None:
        """There is a rank of another host. Ranks of one host never make us open a port."""
        sock = self._tcp or self._bind_tcp()
        self._listeners.append(sock)
        self._listen(sock)
        if not self._place.once:
            self._place.publish(self._address)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock = listener.accept()[0]
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(sock)
        except OSError:
            return
        self._strangers.add(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: Connection) -> None:
        rank = next((r for r, known in self._peers.items() if known is connection), None)
        try:
            got = connection.poll()
            if got is None:
                return
            hello, token = got[0], self._address.token
            if rank is not None or hello.get("token") != token or hello.get("rank") not in range(1, self._size):
                raise ConnectionClosed("a stranger")
            connection.send({"heard": True}, time.monotonic() + 1.0)
        except OSError:
            self._selector.unregister(connection)
            self._strangers.discard(connection)
            connection.close()
            if rank is not None:
                del self._peers[rank]
                self._fail(lost(rank, STEP))
            return
        self._strangers.discard(connection)
        self._peers[hello["rank"]] = connection
        self._deadline = min(self._deadline, time.monotonic() + hello["seconds_left"] - self._margin)

    def _fail(self, failure: Failure) -> None:
        about = {"rank": failure.rank, "cause": failure.cause, "advice": failure.advice}
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.send(about, time.monotonic() + 1.0)
        raise failure.error()


def _join(place: Place, timeout: float) -> Participant:
    """A rank other than 0: finds rank 0, introduces itself, waits until all are there."""
    me, asked, pause = hosts.identity(), "", 0.001
    while time.monotonic() < place.deadline:
        address = place.find()
        if address is not None:
            places = address.from_host(me)
            if not places and asked != address.name:
                place.ask_for_tcp(address)
                asked = address.name
            for family, at in places:
                connection = _introduce(family, at, address.token, place)
                if connection is not None:
                    return _welcomed(connection, place, timeout)
        time.sleep(pause)
        pause = min(pause * 1.5, _LOOK_SECONDS)
    raise silent([0], STEP, timeout).error()


def _introduce(family: int, at: Any, token: str, place: Place) -> Connection | None:
    """A connection to rank 0, or None if no rank 0 of ours listens there (any more)."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    left = max(place.deadline - time.monotonic(), 0.001)
    sock.settimeout(min(left, 2.0))
    try:
        sock.connect(at)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        sock.close()
        return None
    connection = Connection(sock)
    try:
        connection.send({"token": token, "rank": place.rank, "seconds_left": left}, place.deadline)
        connection.receive(min(place.deadline, time.monotonic() + 10.0))
    except OSError:
        connection.close()
        return None
    return connection


def _welcomed(connection: Connection, place: Place, timeout: float) -> Participant:
    failure: Failure | None
    try:
        message, _ = connection.receive(place.deadline)
        failure = None if "welcome" in message else Failure(message["rank"], STEP, message["cause"], message["advice"])
    except TimeoutError:
        failure = silent([0], STEP, timeout)
    except OSError:
        failure = lost(0, STEP)
    if failure is None:
        return Participant(connection, place.rank, place.size, timeout, place.deadline)
    connection.close()
    raise failure.error()
