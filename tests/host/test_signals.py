"""A signal from another process, during a wait on the host, is obeyed within a second, whatever the deadline: Ctrl-C,
SIGTERM as it is, and SIGTERM with a handler that raises."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.cases import gone
from common.ranks import RankPool
from mnnvl_ar._library import PATH
from mnnvl_ar.memory import process

LIMIT = 10.0  # seconds, for what takes a tenth of one; the deadline is 60 s
SECOND = 1.0  # that a signal has to be obeyed in: of ROUNDS the middle one, as any machine may stand still once
ROUNDS = 3
ASKS = b"PyErr_CheckSignals\0"  # by what the library has Python run the handlers that are due


class Stopped(Exception):
    pass


def stop(number: int, _: object) -> None:
    raise Stopped(f"signal {number}")


# By name: the signal, its handler, and what that raises.
SIGNALS: dict[str, tuple[int, Any, str]] = {
    "Ctrl-C": (signal.SIGINT, signal.default_int_handler, "KeyboardInterrupt"),
    "SIGTERM, handled": (signal.SIGTERM, stop, "Stopped"),
    "SIGTERM": (signal.SIGTERM, signal.SIG_DFL, ""),
    "SIGTERM, ignored": (signal.SIGTERM, signal.SIG_IGN, ""),
}
RAISING = [name for name, (*_, raised) in SIGNALS.items() if raised]


@dataclass
class Sent:
    """What the rank saw that sent the signal. at: when; ended: when the other process had ended, 0.0 if it has not;
    fault: what `check` said here, and when."""

    at: float
    ended: float = 0.0
    fault: gone.Told = ("", -1, "", 0.0)


@pytest.fixture
def pool() -> Iterator[RankPool]:
    """Two ranks of our own, whose main threads get signals."""
    pool = RankPool(2)
    yield pool
    pool.discard()


def signalled(rank: Any, name: str, deadline: float = 60.0) -> tuple[str, float] | Sent:
    """Rank 0 waits in a call that rank 1 does not make, and gets the signal from it. What came out of the call, and
    when; and what rank 1 saw."""
    workspace = rank.new_workspace(**gone.SMALL, deadline=deadline)
    number, handler, _ = SIGNALS[name]
    if rank.rank == 0:
        signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})  # ranks block SIGINT, which is for their parent
        rank.store.set("process", str(os.getpid()))
    rank.barrier()
    told = wait(rank, workspace) if rank.rank == 0 else send(rank, workspace, number)
    workspace.close(force=True)
    return told


def wait(rank: Any, workspace: Any) -> tuple[str, float]:
    try:
        try:
            gone.one_call(rank, workspace)
        except RuntimeError:
            for _ in range(1000):  # what the handler raised comes when Python runs again
                time.sleep(0)
    except (KeyboardInterrupt, Stopped) as raised:
        return type(raised).__name__, time.monotonic()
    return "", time.monotonic()


def send(rank: Any, workspace: Any, number: int) -> Sent:
    pid = int(rank.store.get("process"))
    gone.until(lambda: gone.begun(workspace, 0) > 0, "the call does not begin")
    time.sleep(0.3)  # until it naps between looks
    sent = Sent(time.monotonic())
    os.kill(pid, number)

    def is_over() -> bool:
        if not sent.ended and process._since(pid) == "":
            sent.ended = time.monotonic()
        fault = None if sent.fault[0] else gone.told(workspace)
        sent.fault = fault or sent.fault
        return sent.fault[0] != "" and (sent.ended > 0.0 or sent.fault[0] != "PeerGone")

    gone.until(is_over, "nobody is told")
    return sent


def late(rounds: list[list[float]]) -> bool:
    """Of lists of seconds, the longest of each list counts."""
    assert max(map(max, rounds)) < LIMIT, rounds
    return statistics.median(map(max, rounds)) >= SECOND


@pytest.mark.parametrize("name", RAISING)
def test_what_a_handler_raises_comes_out_within_a_second(pool: RankPool, name: str, record_property: Any) -> None:
    """On the rank that waits; and the other one is told which rank has ended its call."""
    took = []
    for _ in range(ROUNDS):
        (raised, when), sent = pool.run(signalled, name)
        assert raised == SIGNALS[name][2]
        kind, peer, text, told = sent.fault
        assert (kind, peer) == ("WorkspaceBroken", 0), text
        assert "rank 0 ended its call itself" in text
        took.append([when - sent.at, told - sent.at])
    assert not late(took), took
    record_property("seconds", took)


@pytest.mark.parametrize("name", RAISING)
def test_control_a_library_that_does_not_ask(tmp_path: Path, name: str) -> None:
    """As in a process without Python: the handler has to wait for the deadline, and that is seen."""
    deaf = tmp_path / "_C.so"
    deaf.write_bytes(PATH.read_bytes().replace(ASKS, b"X" + ASKS[1:]))
    assert deaf.read_bytes() != PATH.read_bytes()
    pool = RankPool(2, library=deaf)
    try:
        (raised, when), sent = pool.run(signalled, name, 4.0)
    finally:
        pool.discard()
    assert raised == SIGNALS[name][2]
    assert sent.fault[0] == "PeerTimeout", sent.fault
    assert late([[when - sent.at]])
    assert late([[sent.fault[3] - sent.at]])


def terminated(pool: RankPool, name: str, deadline: float = 60.0) -> Sent:
    (is_alive, value), (ok, sent) = pool.start(signalled, name, deadline).outcomes(60)
    assert ok, sent
    assert is_alive or "exit code -15" in value
    assert is_alive == (sent.ended == 0.0)
    return sent


def test_sigterm_ends_a_process_that_waits_within_a_second(pool: RankPool, record_property: Any) -> None:
    """And the other rank is told within that second."""
    took = []
    for _ in range(ROUNDS):
        sent = terminated(pool, "SIGTERM")
        kind, peer, text, told = sent.fault
        assert (kind, peer) == ("PeerGone", 0), text
        assert "the process of rank 0 has died" in text
        took.append([sent.ended - sent.at, told - sent.at])
    assert not late(took), took
    record_property("seconds", took)


def test_control_a_process_that_is_deaf_to_sigterm(pool: RankPool) -> None:
    sent = terminated(pool, "SIGTERM, ignored", 4.0)
    assert sent.ended == 0.0
    assert sent.fault[0] == "PeerTimeout", sent.fault
    assert late([[sent.fault[3] - sent.at]])
