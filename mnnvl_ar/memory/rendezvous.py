"""How the ranks of a group connect: rank 0 listens and makes its address known, the others connect to it.

A rank of rank 0's host connects over an abstract unix socket (file descriptors can be passed there), a rank of another
host over TCP, which is opened only if there is such a rank. Two ranks are on one host exactly if that socket works
between them. An address that an earlier bring-up left leads to a closed listener, so a rank simply looks again; no
counter needs to agree. A random token keeps strangers out, and other users are not heard at all on a unix socket.

    rank r  ->  rank 0    {token, rank, seconds_left, who}  introduces itself
    rank 0  ->  rank r    {heard}                           this listener is the right one
    rank 0  ->  rank r    {welcome}, or {failure}           all ranks are connected, and of one group; or why not

What goes wrong on a rank that cannot connect, or before rank 0 can listen, goes through the meeting place (`place.py`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import selectors
import socket
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import BringUpError
from . import hosts
from .connection import Connection, ConnectionClosed, user_of
from .descriptors import SCARCE, Reserve
from .failures import Failure, failure_of, lost, silent
from .group import Members
from .place import ONE_STORE, STEP, Address, GroupShared, Note, Place, place_of
from .vote import Coordinator, Participant, Voter

_LISTEN_SECONDS, _LOOK_SECONDS = 0.04, 0.02  # between two looks at the place, on rank 0 and on the others
_HEARD_SECONDS = 10.0  # that a rank waits until rank 0 has heard it, before it tries again
_COMES_AGAIN = 3.0  # seconds, for a rank of another host that had given a connection up when it was heard
_STRANGERS = 32  # beside the ranks: the oldest has to go when more have connected and said nothing
_MOST_SECONDS = 9e9
_OUT_OF_REACH = (
    f"If that is the wrong address, set {hosts.ADDRESS_VARIABLE} on rank 0 to one that other hosts reach; else look at "
    "firewalls: a random TCP port has to be open between the hosts."
)


def meet(members: Members, timeout: float) -> Voter:
    """Connects all ranks of a group within `timeout` seconds. Collective. `BringUpError` names who did not come."""
    place = place_of(members, timeout)
    if place.size == 1:
        return Coordinator({}, 1, timeout, place.deadline, host=hosts.identity())
    who = members.who()
    members.meets("?")  # until the end of this one
    try:
        place.come()
    except GroupShared as shared:
        failure = Failure(place.rank, STEP, str(shared), ONE_STORE)
        address = place.find()
        if address is not None:
            place.tell(Note(address.name, place.rank, failure, final=True))
        raise failure.error() from shared
    try:
        kind = Listener(place, members, who, timeout) if place.rank == 0 else _Guest(place, members, who, timeout)
        voter = kind.meet()
        voter.contested = place.contested
        return voter
    finally:
        place.leave()


@dataclass(frozen=True)
class Hello:
    """How a rank introduces itself."""

    rank: int
    seconds_left: float
    who: Mapping[str, Any]


def hello_of(message: Mapping[str, Any], token: str, size: int) -> Hello:
    """What a stranger's message says; `ConnectionClosed` if that is not what a rank of a group of `size` would say."""
    shown, rank, left, who = (message.get(name) for name in ("token", "rank", "seconds_left", "who"))
    is_known = isinstance(shown, str) and secrets.compare_digest(shown.encode("utf-8", "replace"), token.encode())
    is_rank = type(rank) is int and 0 < rank < size  # True and 1.0 are none
    is_time = isinstance(left, int | float) and 0 < left < _MOST_SECONDS  # nor is a NaN a time
    if not (is_known and is_rank and is_time and isinstance(who, dict)):
        raise ConnectionClosed("a stranger")
    return Hello(message["rank"], message["seconds_left"], who)


class Listener:
    """Rank 0 until every rank has introduced itself."""

    def __init__(self, place: Place, members: Members, who: dict[str, Any], timeout: float) -> None:
        self._place, self._members, self._size, self._timeout = place, members, place.size, timeout
        self._who = who
        self._margin = min(2.0, 0.1 * timeout)  # decide before the others stop waiting
        self._address = Address(secrets.token_hex(8), secrets.token_hex(16), hosts.identity(), os.geteuid(), [])
        self._listeners: list[socket.socket] = []
        self._tcp: socket.socket | None = None  # bound; one of the listeners only once it is needed
        self._reserve = Reserve()  # for the ranks that are still to come
        self._strangers: dict[Connection, None] = {}  # connected, not yet introduced; the oldest first
        self._peers: dict[int, Connection] = {}
        self._left: dict[int, float] = {}  # whose connection has ended, and when
        self._troubles: dict[int, Failure] = {}  # what keeps a rank from connecting
        self._selector = selectors.PollSelector()
        self._look_at = 0.0

    def meet(self) -> Coordinator:
        done = False
        try:
            self._begin()
            self._deadline = self._place.deadline - self._margin
            while len(self._peers) < self._size - 1 or self._have_left():
                now = time.monotonic()
                if now > self._deadline:
                    self._fail(self._late(), patient=False)
                for rank, since in self._left.items():
                    if rank not in self._peers and now > since + _COMES_AGAIN:
                        self._give_up(rank)
                self._serve()
            name = self._who.get("met", "").replace("?", "") or self._address.name
            for rank, connection in list(self._peers.items()):
                try:
                    connection.send({"welcome": name}, time.monotonic() + 1.0)
                except OSError:
                    del self._peers[rank]
                    connection.close()
                    self._give_up(rank)
            self._members.meets(name)
            done = True
            return Coordinator(
                self._peers, self._size, self._timeout, self._deadline, self._margin, host=self._address.host
            )
        finally:
            self._reserve.give()
            self._selector.close()
            sockets = (*self._listeners, *(() if self._tcp is None else (self._tcp,)))
            for closing in (*sockets, *self._strangers, *(() if done else self._peers.values())):
                closing.close()

    def _have_left(self) -> bool:
        """Whether a connection has ended since its rank introduced itself; the last look before all are welcomed."""
        for rank, connection in list(self._peers.items()):
            with contextlib.suppress(OSError):
                if connection.poll() is None:
                    continue
            self._lose(rank)
        return len(self._peers) < self._size - 1

    def _lose(self, rank: int) -> None:
        """It is dead; or, from another host, it did not hear us in time, and comes again."""
        connection = self._peers.pop(rank)
        self._show_out(connection)
        if connection.is_local:
            self._give_up(rank)
        self._left[rank] = time.monotonic()

    def _give_up(self, rank: int) -> None:
        """Of a rank that is gone: nobody waits until it has been told, nor until others have whose connection ended."""
        self._fail(lost(rank, STEP), gone={rank, *(self._left.keys() - self._peers.keys())})

    def _begin(self) -> None:
        try:
            # A connection a rank, and a TCP port; beside them a socket, and what a look at the place or the host takes.
            self._reserve.take(self._size + 3)
            self._reserve.give(3)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listeners.append(sock)
            sock.bind(self._address.unix)
            self._listen(sock)
            if self._place.once:
                self._bind_tcp()
        except OSError as error:
            self._reserve.give()
            failure = replace(failure_of(error, 0, STEP, ""), cause=f"cannot listen: {error}")
            self._place.give_up(failure)
            raise failure.error() from error
        self._place.publish(self._address)

    def _late(self) -> Failure:
        missing = [rank for rank in range(1, self._size) if rank not in self._peers]
        known = [self._troubles[rank] for rank in missing if rank in self._troubles]
        return known[0] if known else silent(missing, STEP, self._timeout)

    def _listen(self, sock: socket.socket) -> None:
        sock.listen(self._size)
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ)

    def _serve(self) -> None:
        if time.monotonic() >= self._look_at:
            self._look()
            self._look_at = time.monotonic() + _LISTEN_SECONDS
        for key, _ in self._selector.select(max(self._look_at - time.monotonic(), 0.0)):
            if isinstance(key.fileobj, socket.socket):
                self._accept(key.fileobj)
            elif isinstance(key.fileobj, Connection) and key.fileobj.fileno() >= 0:
                self._receive(key.fileobj)

    def _look(self) -> None:
        """Whether a rank has left a note."""
        try:
            note = self._place.told(self._address)
        except BringUpError as error:
            self._fail(Failure(error.rank, error.step, error.cause, error.advice), by_place=False)
        if note is None:
            return
        if note.trouble is not None:
            self._troubles[note.rank] = note.trouble
            if note.final:
                self._fail(note.trouble)
        if len(self._listeners) == 1:
            try:
                self._open_tcp()
            except OSError as error:
                self._fail(replace(failure_of(error, 0, STEP, ""), cause=f"cannot listen: {error}"))

    def _bind_tcp(self) -> socket.socket:
        """A port of ours, and its address; nobody can connect yet."""
        self._reserve.give(1)
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
            sock = self._accepted(listener)
        except OSError as error:
            if error.errno in SCARCE:
                self._fail(replace(failure_of(error, 0, STEP, ""), cause=f"cannot accept a connection: {error}"))
            return
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            elif user_of(sock) != os.geteuid():
                raise ConnectionClosed("another user")
            connection = Connection(sock)
        except OSError:
            sock.close()
            return
        self._strangers[connection] = None
        self._selector.register(connection, selectors.EVENT_READ)
        if len(self._strangers) > _STRANGERS + self._size:
            self._show_out(next(iter(self._strangers)))

    def _accepted(self, listener: socket.socket) -> socket.socket:
        """With what is held for it, and then with what a stranger has, if there is no descriptor left."""
        while True:
            try:
                return listener.accept()[0]
            except OSError as error:
                if error.errno not in SCARCE or not (self._reserve.give(1) or self._strangers):
                    raise
                if error.errno in SCARCE and not self._reserve and self._strangers:
                    self._show_out(next(iter(self._strangers)))

    def _show_out(self, stranger: Connection) -> None:
        self._selector.unregister(stranger)
        self._strangers.pop(stranger, None)
        stranger.close()

    def _receive(self, connection: Connection) -> None:
        rank = next((r for r, known in self._peers.items() if known is connection), None)
        try:
            got = connection.poll()
            if got is None:
                return
            if rank is not None:
                raise ConnectionClosed("it has nothing to say yet")
            hello = hello_of(got[0], self._address.token, self._size)
            connection.send({"heard": True}, time.monotonic() + 1.0)
        except OSError:
            if rank is None:
                self._show_out(connection)
            else:
                self._lose(rank)
            return
        connection.trust()
        del self._strangers[connection]
        before = self._peers.pop(hello.rank, None)
        if before is not None:  # it did not hear us in time, and tries again
            self._selector.unregister(before)
            before.close()
        self._peers[hello.rank] = connection
        self._reserve.give(1)
        self._deadline = min(self._deadline, time.monotonic() + hello.seconds_left - self._margin)
        self._compare(hello)

    def _compare(self, hello: Hello) -> None:
        """All ranks are of one group."""
        for name in self._who.keys() | hello.who.keys():
            ours, theirs = self._who.get(name), hello.who.get(name)
            if ours == theirs or (name == "met" and "?" in (ours, theirs)):
                continue
            what = {"met": "what they were named when they met before"}.get(name, name)
            cause = f"it is of another group: {what} is {theirs!r} there, and {ours!r} on rank 0"
            self._fail(Failure(hello.rank, STEP, cause, ONE_STORE))

    def _fail(
        self, failure: Failure, *, by_place: bool = True, patient: bool = True, gone: Collection[int] = ()
    ) -> None:
        """Tells all ranks. patient: those too that have yet to come, as long as there is time; but not `gone`."""
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.send({"failure": asdict(failure)}, time.monotonic() + 1.0)
        self._reserve.give()
        missing = [rank for rank in range(1, self._size) if rank not in self._peers]
        if by_place and missing:
            for stranger in list(self._strangers):
                self._show_out(stranger)
            for listener in self._listeners:
                listener.close()
            with contextlib.suppress(BringUpError):
                self._place.answer(failure, missing, patient, gone)
        raise failure.error()


class _Guest:
    """A rank other than 0: finds rank 0, introduces itself, waits until all are there."""

    def __init__(self, place: Place, members: Members, who: dict[str, Any], timeout: float) -> None:
        self._place, self._members, self._timeout = place, members, timeout
        self._me, self._who = hosts.identity(), who
        self._reserve = Reserve()

    def meet(self) -> Participant:
        place = self._place
        try:
            self._reserve.take(2)  # for the connection, and for what a look at the place takes
            self._reserve.give(1)
            address, connection = self._look_for_rank_0()
        except OSError as error:
            self._reserve.give()
            failure = replace(failure_of(error, place.rank, STEP, ""), cause=f"cannot connect: {error}")
            place.give_up(failure)
            raise failure.error() from error
        finally:
            self._reserve.give()
        self._welcomed(connection)
        near = f"{self._me}{'/apart' if self._me == address.host else ''}"
        host = address.host if connection.is_local else near
        return Participant(connection, place.rank, place.size, self._timeout, place.deadline, host=host)

    def _look_for_rank_0(self) -> tuple[Address, Connection]:
        """`OSError` if this process cannot have a socket at all."""
        place, told, pause = self._place, None, 0.001
        while time.monotonic() < place.deadline:
            address = place.find()
            if address is not None:
                note = Note(address.name, place.rank)
                for family, at in address.from_host(self._me):
                    try:
                        connection = self._introduce(family, at, address.token)
                    except ConnectionError as error:  # nobody listens there (any more), or not to us
                        if family != socket.AF_UNIX:
                            note = replace(note, trouble=self._out_of_reach(address, at, error))
                        continue
                    return address, connection
                # What we cannot reach from here has to listen on TCP, too; and to know what keeps us from it.
                if not address.is_near(self._me) and note != told:
                    place.tell(note)
                    told = note
            time.sleep(pause)
            pause = min(pause * 1.5, _LOOK_SECONDS)
        if told is not None and told.trouble is not None:
            raise told.trouble.error()
        raise silent([0], STEP, self._timeout).error()

    def _out_of_reach(self, address: Address, at: tuple[str, int], error: OSError) -> Failure:
        where = f"{at[0]} port {at[1]}"
        cause = f"cannot reach rank 0 on {hosts.name_of(address.host)}, at {where} last: {error}"
        return Failure(self._place.rank, STEP, cause, _OUT_OF_REACH)

    def _introduce(self, family: int, at: Any, token: str) -> Connection:
        """`ConnectionError` if no rank 0 of ours listens there; any other `OSError` is this process's own."""
        self._reserve.give(1)
        place = self._place
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT:  # no IPv6 here
                raise ConnectionRefusedError(error.errno, str(error)) from error
            raise
        left = max(place.deadline - time.monotonic(), 0.001)
        sock.settimeout(min(left, 2.0))
        try:
            sock.connect(at)
            if family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            elif user_of(sock) != os.geteuid():
                raise ConnectionRefusedError("another user listens there")
            connection = Connection(sock)
            hello = {"token": token, "rank": place.rank, "seconds_left": left, "who": self._who}
            connection.send(hello, place.deadline)
            if "heard" not in connection.receive(min(place.deadline, time.monotonic() + _HEARD_SECONDS))[0]:
                raise ConnectionRefusedError("another program listens there")
        except OSError as error:
            sock.close()
            is_own = error.errno in SCARCE or (family == socket.AF_UNIX and isinstance(error, PermissionError))
            if is_own or isinstance(error, ConnectionError):
                raise
            raise ConnectionRefusedError(error.errno, str(error) or type(error).__name__) from error
        connection.trust()
        return connection

    def _welcomed(self, connection: Connection) -> None:
        failure: Failure | None = None
        try:
            message, _ = connection.receive(self._place.deadline)
            if "failure" in message:
                failure = Failure(**message["failure"])
            else:
                self._members.meets(message["welcome"])
        except TimeoutError:
            failure = silent([0], STEP, self._timeout)
        except OSError:
            failure = lost(0, STEP)
        except BaseException:
            connection.close()
            raise
        if failure is not None:
            connection.close()
            raise failure.error()
