"""A connection where the kernel has no room just now, for very long waits, and in a process that forks; and what a rank
meets before it has one."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from common.ranks import ROOT
from mnnvl_ar.memory import hosts
from mnnvl_ar.memory.connection import Connection, ConnectionClosed
from mnnvl_ar.memory.failures import Failure
from mnnvl_ar.memory.group import Members
from mnnvl_ar.memory.place import Gathered

PATIENCE = 20.0


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Connection]]:
    ends = [Connection(end) for end in socket.socketpair()]
    for end in ends:
        end.trust()
    yield ends[0], ends[1]
    for end in ends:
        end.close()


class Full:
    """A socket over which no descriptors go, as a user has too many under way, `times` times."""

    def __init__(self, real: socket.socket, times: float) -> None:
        self._real, self.times = real, times

    def sendmsg(self, *what: Any) -> int:
        self.times -= 1
        if self.times >= 0:
            raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")
        return self._real.sendmsg(*what)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_descriptors_wait_for_others_to_take_theirs(pair: tuple[Connection, Connection]) -> None:
    pair[0]._sock = Full(pair[0]._sock, 3)  # type: ignore[assignment]
    read, write = os.pipe()
    pair[0].send({"a": 1}, time.monotonic() + PATIENCE, [read])
    message, fds = pair[1].receive(time.monotonic() + PATIENCE)
    assert message == {"a": 1}
    assert len(fds) == 1
    pair[0]._sock.times = float("inf")  # type: ignore[attr-defined]
    with pytest.raises(TimeoutError):
        pair[0].send({"a": 2}, time.monotonic() + 0.1, [read])
    for fd in (read, write, *fds):
        os.close(fd)


@pytest.mark.parametrize("seconds", [3e6, 1e12])
def test_a_wait_may_be_as_long_as_one_likes(pair: tuple[Connection, Connection], seconds: float) -> None:
    """The kernel counts milliseconds in an int, of which there are 24 days."""
    with mock.patch.object(Connection, "poll", side_effect=[None, ({}, [])]):
        pair[1]._sock.sendall(b"x")
        assert pair[0].receive(time.monotonic() + seconds) == ({}, [])


def test_a_child_that_is_forked_does_not_hold_it(pair: tuple[Connection, Connection]) -> None:
    """Or a process that dies would live on in its child, to all others. Also before the bring-up has ended."""
    child = os.fork()
    if child == 0:
        signal.pause()
    pair[0].close()
    try:
        with pytest.raises(ConnectionClosed):
            pair[1].receive(time.monotonic() + PATIENCE)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


class Alone:
    """A group whose all-gather is counted."""

    rank, size, gathered = 0, 1, 0

    def all_gather(self, text: str) -> list[str]:
        self.gathered += 1
        return [text]


def test_who_fails_behind_the_all_gather_gathers_no_more() -> None:
    """The others have gathered, and would not come."""
    group = Alone()
    place = Gathered(Members(group), 5.0)
    place._address = mock.Mock()
    place.give_up(Failure(0, "rendezvous", "as ordered"))
    assert group.gathered == 0


class Proxy:
    """As a library may wrap a group: what it has is found by asking."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def test_a_proxy_of_a_group_is_a_group() -> None:
    members = Members(Proxy(Alone()))
    assert (members.rank, members.size) == (0, 1)


@pytest.mark.parametrize("error", [OSError("slow"), UnicodeError("label too long"), LookupError("unknown encoding")])
def test_a_name_that_cannot_be_resolved_is_no_failure(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hosts.ADDRESS_VARIABLE, raising=False)
    for name in ("_of_default_route", "_of_interfaces"):
        monkeypatch.setattr(hosts, name, lambda *_: [])
    monkeypatch.setattr(socket, "getaddrinfo", mock.Mock(side_effect=error))
    assert hosts.addresses() == ["127.0.0.1"]


def test_the_resolver_is_not_asked_where_an_interface_has_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take longer than a bring-up has."""
    monkeypatch.delenv(hosts.ADDRESS_VARIABLE, raising=False)
    monkeypatch.setattr(hosts, "_of_interfaces", lambda: ["192.0.2.7"])
    asked = mock.Mock(side_effect=AssertionError)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    assert "192.0.2.7" in hosts.addresses()
    asked.assert_not_called()


WITHOUT_STDIN = """
import os
os.close(0)
from mnnvl_ar.memory.host_driver import HostDriver
driver = HostDriver()
handle = driver.create(4096, "memfd")
assert handle > 2, handle
driver.release(handle)
"""


def test_no_handle_is_0(tmp_path: Any) -> None:
    """In a process without stdin the first descriptor is; 0 says that there is none."""
    command = [sys.executable, "-c", WITHOUT_STDIN]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
