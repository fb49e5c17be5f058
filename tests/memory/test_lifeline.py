"""What stays open after a bring-up: who is gone is heard by all, on one host or several, and only that."""

from __future__ import annotations

import logging
import os
import signal
import socket
import statistics
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from memory import ranks
from memory.simulated_driver import SimulatedDriver
from memory.test_allocate import make
from mnnvl_ar.memory import hosts, lifeline
from mnnvl_ar.memory.connection import Connection
from mnnvl_ar.memory.lifeline import ASLEEP, CLOSED, DIED, EXITED, Gone, Lifeline

SECOND = 1.0  # that a death has to be heard of in


@pytest.fixture
def star() -> Any:
    """Three ranks in one process."""
    pairs = [socket.socketpair() for _ in range(2)]
    ends = [[Connection(sock) for sock in side] for side in zip(*pairs, strict=True)]
    for connection in (*ends[0], *ends[1]):
        connection.trust()
    made = [Lifeline(0, 3, dict(enumerate(ends[0], 1)))]
    made += [Lifeline(rank, 3, {0: end}) for rank, end in enumerate(ends[1], 1)]
    yield made
    for line in made:
        line.leave(CLOSED)


def end(line: Lifeline) -> None:
    """As the kernel does when a process ends."""
    line._close()


def test_who_leaves_is_heard_by_all(star: list[Lifeline]) -> None:
    star[1].next_epoch = lambda: 7
    star[1].leave(CLOSED)
    assert star[0].look() == star[2].look() == [Gone(1, CLOSED, 7)]
    star[2].settled(Gone(1, CLOSED, 7))
    assert star[2].look() == []
    star[1].leave(DIED)  # it has left
    assert star[0].look() == [Gone(1, CLOSED, 7)]
    assert star[1].look() == []


def test_an_end_without_a_word_is_a_death(star: list[Lifeline]) -> None:
    end(star[2])
    assert star[1].look() == []  # it has it from rank 0
    assert star[0].look() == star[1].look() == [Gone(2, DIED)]
    end(star[0])
    assert star[1].look() == [Gone(2, DIED), Gone(0, DIED)]


def test_who_ends_is_gone_when_its_process_is(star: list[Lifeline]) -> None:
    star[0].next_epoch = lambda: 3
    star[0].leave(EXITED)
    assert star[1].look() == star[2].look() == []
    end(star[0])
    assert star[1].look() == star[2].look() == [Gone(0, EXITED, 3)]


def test_an_epoch_that_cannot_be_known_is_no_obstacle(star: list[Lifeline]) -> None:
    star[1].next_epoch = mock.Mock(side_effect=RuntimeError("the device has failed"))
    star[1].leave(CLOSED)
    assert star[0].look() == [Gone(1, CLOSED)]


def test_silence_is_no_death(star: list[Lifeline], caplog: pytest.LogCaptureFixture) -> None:
    with (
        mock.patch.object(Lifeline, "_ready", return_value=[2]),
        mock.patch.object(Connection, "poll", side_effect=TimeoutError(110, "Connection timed out")),
        caplog.at_level(logging.WARNING, "mnnvl_ar"),
    ):
        assert star[0].look() == []
    assert caplog.text == "", "a log that blocks must not hold up who looks"
    (said,) = star[0].warnings()
    assert said.startswith("nothing is heard of rank 2 any more (")
    assert star[0].warnings() == []
    assert star[0].look() == star[1].look() == []


def test_who_stays_to_listen_hears_of_all(star: list[Lifeline]) -> None:
    """The last word of each other rank, also by way of a rank 0 that has left; only then have all left."""
    star[0].leave(CLOSED, stay=True)
    assert (star[1].look(), star[2].look()) == ([Gone(0, CLOSED)],) * 2
    star[2].leave(ASLEEP, stay=True)
    assert star[0].look() == [Gone(2, ASLEEP)]
    assert star[1].look() == [Gone(0, CLOSED), Gone(2, ASLEEP)]
    assert [line.staying() for line in star] == [[1], [], [1]]
    assert not any(line.all_have_left() for line in star), "rank 1 has not, and knows it"
    star[1].leave(CLOSED, stay=True)
    assert star[1].all_have_left()
    assert not star[2].all_have_left()
    heard = [line.look() for line in star]
    assert all(line.all_have_left() for line in star)
    for line in star:  # what follows is no news: those who left have ended
        line.end()
    assert [line.look() for line in star] == heard


def test_who_ends_without_that_counts_a_while_later(star: list[Lifeline]) -> None:
    for line in star[:2]:
        line.leave(CLOSED, stay=True)
    with mock.patch.object(lifeline, "_LAST_SECONDS", 2.0):
        end(star[2])
        heard = star[0].look(), star[1].look()
    assert heard == ([Gone(1, CLOSED), Gone(2, DIED)], [Gone(0, CLOSED), Gone(2, DIED)])
    assert star[0].staying() == star[1].staying() == [2]
    time.sleep(2.05)
    assert star[0].all_have_left()
    assert star[1].all_have_left()


def test_a_rank_of_which_nothing_is_heard_has_not_left(star: list[Lifeline]) -> None:
    for line in star[:2]:
        line.leave(CLOSED, stay=True)
    star[0].look()
    with (
        mock.patch.object(Lifeline, "_ready", return_value=[2]),
        mock.patch.object(Connection, "poll", side_effect=TimeoutError(110, "Connection timed out")),
    ):
        star[0].look()
    assert star[0].staying() == [2]
    assert not star[0].all_have_left()


def test_a_word_that_came_with_the_last_verdict_is_heard(star: list[Lifeline]) -> None:
    """Rank 1 has read it with the message before it; the socket has nothing to say any more."""
    end_of_1 = star[1]._connections[0]
    star[0]._connections[1].send({"failure": None}, time.monotonic() + 1.0)
    star[0].leave(CLOSED, stay=True)
    assert end_of_1.poll() == ({"failure": None}, [])
    with mock.patch.object(Connection, "has_unread", False):  # the control
        assert star[1].look() == []
    assert star[1].look() == [Gone(0, CLOSED)]


def test_what_a_bring_up_still_sends_is_no_word(star: list[Lifeline]) -> None:
    late = {"step": "multicast write", "failure": None, "data": None}
    star[2]._connections[0].send(late, time.monotonic() + 1.0)
    assert star[0].look() == []
    star[2].leave(CLOSED, stay=True)
    assert star[0].look() == [Gone(2, CLOSED)]


def hosts_body(rank: int, size: int, store: dist.Store, victim: int, late: float) -> Any:
    """Each rank is on a host of its own: they are connected by TCP. Rank 0 looks so many seconds `late`."""
    group = ranks.group(store, "first", rank, size)
    with (
        mock.patch.object(hosts, "identity", return_value=f"host{rank}/kernel {rank}/1"),
        mock.patch.dict(os.environ, {hosts.ADDRESS_VARIABLE: "127.0.0.1"}),
    ):
        memory = make(
            group, device=torch.device("cuda", 0), transport="unicast", driver=SimulatedDriver(rank, host=f"h{rank}")
        )
    connections = list(memory.lifeline._connections.values())
    keepalive = [c._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for c in connections]
    ranks.meet(store, "made", size)
    if rank == victim:
        store.set("killed", str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        time.sleep(late)
    until = time.monotonic() + 30.0
    while time.monotonic() < until and not memory.lifeline.look():
        time.sleep(0.005)
    took, gone = time.monotonic() - float(store.get("killed").decode()), memory.lifeline.look()
    ranks.meet(store, "heard", size - 1)
    memory.close()
    return [c.is_local for c in connections], keepalive, gone, took


def deaths_on_another_host(victim: int, late: float = 0.0) -> list[float]:
    """Seconds until the death was heard of, by each other rank."""
    ends = ranks.launch(3, hosts_body, victim, late)
    assert ends[victim].exitcode == -signal.SIGKILL
    others = [end.value for rank, end in enumerate(ends) if rank != victim]
    for local, keepalive, gone, took in others:
        assert not any(local)
        assert all(keepalive)
        assert gone == [Gone(victim, DIED)]
        assert took < 10.0
    return [took for *_, took in others]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_on_another_host_is_heard_within_a_second(victim: int) -> None:
    """Of three the middle one: any machine may stand still once."""
    took = [max(deaths_on_another_host(victim)) for _ in range(3)]
    assert statistics.median(took) < SECOND, took


def test_control_all_wait_for_a_rank_0_that_looks_late() -> None:
    took = deaths_on_another_host(1, late=1.2 * SECOND)
    assert min(took) > SECOND, took
