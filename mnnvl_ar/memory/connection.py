"""A connection between two processes: whole messages, file descriptors included, and no wait past a deadline.

A message is a JSON object (no pickle: a socket must not be able to run code) after its length in 4 bytes. Descriptors
are attached to its first byte (SCM_RIGHTS) and belong to whoever receives the message.

Whoever is at the other end is a stranger until `trust` is called. From a stranger a message has 1 KiB at most and no
descriptors; whatever else comes ends that connection, as `ConnectionClosed`, and nothing but that.
"""

from __future__ import annotations

import array
import errno
import json
import os
import select
import socket
import struct
import time
import weakref
from typing import Any

_HEAD = struct.Struct("<I")
_LIMIT = 64 << 20
STRANGER_LIMIT = 1 << 10
_LONGEST = 1e9  # milliseconds of a wait that the kernel counts in an int: 12 days; whoever waits asks again
_MAX_FDS = 253  # what Linux lets one message carry
_CREDENTIALS = struct.Struct("iII")  # process, user, group
_KEEPALIVE = (  # seconds, but for the last: milliseconds
    (socket.TCP_KEEPIDLE, 10),
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 4),
    (socket.TCP_USER_TIMEOUT, 30000),
)

Message = dict[str, Any]


class ConnectionClosed(ConnectionError):
    """The other end closed the connection, or its process is gone, or it sent what is no message."""


class DescriptorsLost(OSError):
    """The message is here (`message`), but this process had no room for the descriptors that came with it."""

    def __init__(self, message: Message) -> None:
        super().__init__(errno.EMFILE, "no room for the peers' file descriptors")
        self.message = message


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def user_of(sock: socket.socket) -> int:
    """Whose process is at the other end of a unix socket."""
    told = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(told)[1])


_open: weakref.WeakSet[Connection] = weakref.WeakSet()


class Connection:
    """One connected stream socket (unix or TCP), which it owns. A forked child has no part in it: its copy is closed in
    it, or the end of this process would not be the end of the connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        _open.add(self)
        self._bytes = bytearray()
        self._fds: list[int] = []
        self._is_stranger, self._is_short = True, False

    @property
    def is_local(self) -> bool:
        """Whether descriptors can be passed."""
        return self._sock.family == socket.AF_UNIX

    @property
    def has_unread(self) -> bool:
        """Whether `poll` may have a message that has left the socket already, behind the one before it."""
        return bool(self._bytes)

    def notice_silence(self) -> None:
        """From now on a host that does not answer for half a minute ends the connection, as an `OSError` that is no
        `ConnectionClosed`. A unix socket needs none of that."""
        if not self.is_local and self.fileno() >= 0:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                self._sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def trust(self) -> None:
        """The other end has shown who it is."""
        self._is_stranger = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        close_all(self._fds)
        self._fds = []
        self._sock.close()

    def send(self, message: Message, deadline: float, fds: list[int] | None = None) -> None:
        """Sends all of it. `ConnectionClosed` if nobody reads any more, `TimeoutError` past `deadline` (monotonic)."""
        body = json.dumps(message).encode()
        data = memoryview(_HEAD.pack(len(body)) + body)
        ancillary = []
        if fds:
            if len(fds) > _MAX_FDS:
                raise OSError(f"{len(fds)} descriptors do not fit into one message ({_MAX_FDS})")
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        while data:
            try:
                sent = self._sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(deadline, write=True)
                continue
            except (BrokenPipeError, ConnectionError) as error:
                raise ConnectionClosed(str(error)) from error
            except OSError as error:
                # A user has so many descriptors under way, to all its processes, as a process may have open (unix(7)):
                # others are to take theirs first.
                if error.errno != errno.ETOOMANYREFS:
                    raise
                if time.monotonic() >= deadline:
                    raise TimeoutError from error
                time.sleep(0.002)
                continue
            data, ancillary = data[sent:], []

    def receive(self, deadline: float) -> tuple[Message, list[int]]:
        """The next message. `ConnectionClosed` at the end of the stream, `TimeoutError` past the deadline."""
        while True:
            got = self.poll()
            if got is not None:
                return got
            self._wait(deadline, write=False)

    def poll(self) -> tuple[Message, list[int]] | None:
        """The next message if all of it is here; never waits. `DescriptorsLost` for one that came without all of its
        descriptors."""
        while True:
            if len(self._bytes) >= _HEAD.size:
                nbytes = _HEAD.unpack_from(self._bytes)[0]
                if nbytes > (STRANGER_LIMIT if self._is_stranger else _LIMIT):
                    raise ConnectionClosed("not a message of this library")
                if len(self._bytes) >= _HEAD.size + nbytes:
                    return self._take(_HEAD.size + nbytes)
            if not self._read():
                return None

    def _read(self) -> bool:
        """Whether there was anything to read."""
        try:
            if self._is_stranger:  # without room for descriptors the kernel drops them, and says so
                data, ancillary, flags, _ = self._sock.recvmsg(_HEAD.size + STRANGER_LIMIT)
            else:
                space = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
                data, ancillary, flags, _ = self._sock.recvmsg(65536, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except ConnectionError as error:
            raise ConnectionClosed(str(error)) from error
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self._fds += fds
        if flags & socket.MSG_CTRUNC:
            if self._is_stranger:
                raise ConnectionClosed("a stranger sent descriptors")
            self._is_short = True
        if not data:
            raise ConnectionClosed("end of stream")
        self._bytes += data
        return True

    def _take(self, end: int) -> tuple[Message, list[int]]:
        try:
            message = json.loads(self._bytes[_HEAD.size : end])
        except (ValueError, RecursionError) as error:  # a ValueError if it is no UTF-8, too
            raise ConnectionClosed("not a message of this library") from error
        if not isinstance(message, dict):
            raise ConnectionClosed("not a message of this library")
        del self._bytes[:end]
        fds, self._fds, is_short, self._is_short = self._fds, [], self._is_short, False
        if is_short:
            close_all(fds)
            raise DescriptorsLost(message)
        return message, fds

    def _wait(self, deadline: float, write: bool) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        waiter = select.poll()  # not select.select, which cannot take a descriptor above 1023
        waiter.register(self._sock, select.POLLOUT if write else select.POLLIN)
        waiter.poll(min(left * 1000 + 1, _LONGEST))


def _after_fork() -> None:
    for connection in list(_open):
        connection.close()


os.register_at_fork(after_in_child=_after_fork)
