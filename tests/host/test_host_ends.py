"""Nothing is left behind by host ranks, however they end."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.cases.ends import (
    check_closes,
    check_closes_without_group,
    check_dropped,
    check_forked,
    open_workspaces,
    survive,
)
from common.ranks import RankPool, rank_pool


@pytest.fixture
def pool() -> Iterator[RankPool]:
    """Three ranks of our own, to be harmed."""
    pool = RankPool(3)
    yield pool
    pool.discard()


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def nothing_is_left(before: set[str]) -> bool:
    """Other tests run beside this one, and what they have there goes by itself."""
    until = time.monotonic() + 20
    while shared_memory() - before and time.monotonic() < until:
        time.sleep(0.05)
    return not shared_memory() - before


def memory_of(pids: list[int]) -> list[int]:
    """Those of the processes that still exist."""
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_close_gives_all_back() -> None:
    rank_pool(3).run(check_closes)


def test_close_after_the_group(pool: RankPool) -> None:
    pool.run(check_closes_without_group)


def test_dropped_workspace_is_told_of(pool: RankPool) -> None:
    pool.run(check_dropped)


def test_forked_child_is_refused() -> None:
    rank_pool(3).run(check_forked)


def test_normal_end_leaves_nothing(pool: RankPool) -> None:
    before = shared_memory()
    pool.run(open_workspaces)
    pids = pool.pids
    pool.close()
    assert memory_of(pids) == []
    assert nothing_is_left(before)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_killed_rank_leaves_nothing(pool: RankPool, victim: int) -> None:
    """The others are told at the deadline at the latest, close what they have, and nothing stays in /dev/shm."""
    before = shared_memory()
    pool.run(open_workspaces)
    running = pool.start(survive, victim)
    time.sleep(0.2)
    pool.kill(victim, signal.SIGKILL)
    outcomes = running.outcomes(60)
    assert not outcomes[victim][0]
    others = [outcome for rank, outcome in enumerate(outcomes) if rank != victim]
    assert {name for _, name in others} <= {"PeerGone", "PeerTimeout", "WorkspaceBroken"}, others
    assert all(ok for ok, _ in others)
    assert nothing_is_left(before)


def test_all_killed_leave_nothing(pool: RankPool) -> None:
    before = shared_memory()
    pool.run(open_workspaces)
    pool.discard()
    assert nothing_is_left(before)
    pool.run(open_workspaces)  # and there are new ranks to be had
