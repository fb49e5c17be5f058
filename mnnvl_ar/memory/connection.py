"""A connection between two processes: whole messages, file descriptors included, and no wait past a deadline.

A message is a JSON object (no pickle: a socket must not be able to run code) after its length in 4 bytes. Descriptors
are attached to its first byte (SCM_RIGHTS) and belong to whoever receives the message.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import struct
import time
from typing import Any

_HEAD = struct.Struct("<I")
_LIMIT = 64 << 20
_MAX_FDS = 253  # what Linux lets one message carry

Message = dict[str, Any]


class ConnectionClosed(OSError):
    """The other end closed the connection, or its process is gone."""


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class Connection:
    """One connected stream socket (unix or TCP), which it owns."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._bytes = bytearray()
        self._fds: list[int] = []

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
            data, ancillary = data[sent:], []

    def receive(self, deadline: float) -> tuple[Message, list[int]]:
        """The next message. `ConnectionClosed` at the end of the stream, `TimeoutError` past the deadline."""
        while True:
            got = self.poll()
            if got is not None:
                return got
            self._wait(deadline, write=False)

    def poll(self) -> tuple[Message, list[int]] | None:
        """The next message if all of it is here; never waits."""
        while True:
            if len(self._bytes) >= _HEAD.size:
                end = _HEAD.size + _HEAD.unpack_from(self._bytes)[0]
                if end > _LIMIT:
                    raise ConnectionClosed("not a message of this library")
                if len(self._bytes) >= end:
                    return self._take(end)
            try:
                size = _MAX_FDS * array.array("i").itemsize
                data, ancillary, flags, _ = self._sock.recvmsg(65536, socket.CMSG_SPACE(size), socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return None
            except ConnectionError as error:
                raise ConnectionClosed(str(error)) from error
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds = array.array("i")
                    fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                    self._fds += fds
            if flags & socket.MSG_CTRUNC:
                raise OSError("no room for the peers' file descriptors: raise `ulimit -n`")
            if not data:
                raise ConnectionClosed("end of stream")
            self._bytes += data

    def _take(self, end: int) -> tuple[Message, list[int]]:
        try:
            message = json.loads(self._bytes[_HEAD.size : end])
        except ValueError as error:
            raise ConnectionClosed("not a message of this library") from error
        del self._bytes[:end]
        fds, self._fds = self._fds, []
        if not isinstance(message, dict):
            close_all(fds)
            raise ConnectionClosed("not a message of this library")
        return message, fds

    def _wait(self, deadline: float, write: bool) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        waiter = select.poll()  # not select.select, which cannot take a descriptor above 1023
        waiter.register(self._sock, select.POLLOUT if write else select.POLLIN)
        waiter.poll(left * 1000 + 1)
