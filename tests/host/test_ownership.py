"""Copies, other processes, threads and signals, and a monitor that outlives what it calls; each with its control."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.cases import ownership, unguarded
from common.ranks import RankPool, RanksFailed, rank_pool


@pytest.fixture
def pool() -> Iterator[RankPool]:
    """Two ranks of our own, whose main thread gets signals, or whose workspaces are left."""
    pool = RankPool(2)
    yield pool
    pool.discard()


def test_a_copy_is_the_workspace() -> None:
    rank_pool(2).run(ownership.check_copies)


def test_a_foreign_handle_is_refused() -> None:
    rank_pool(2).run(ownership.check_foreign)


@pytest.mark.parametrize("name", ownership.RAISED)
def test_the_monitor_outlives_on_fault(name: str) -> None:
    rank_pool(2).run(ownership.check_on_fault_raises, name)


def test_on_fault_keeps_nobody_alive(pool: RankPool) -> None:
    pool.run(ownership.check_owner_is_not_kept)


def test_on_fault_does_not_wait_for_a_log() -> None:
    rank_pool(2).run(ownership.check_blocking_log)


def test_close_by_force_ends_a_call_of_another_thread() -> None:
    rank_pool(2).run(ownership.check_close_ends_calls)


def test_recover_ends_a_call_of_another_thread() -> None:
    rank_pool(2).run(ownership.check_recover_ends_calls)


@pytest.mark.parametrize("raises", [True, False])
def test_signals_during_a_wait(pool: RankPool, raises: bool) -> None:
    pool.run(ownership.check_signal, raises)


def test_it_says_what_it_is() -> None:
    rank_pool(2).run(ownership.check_says_what_it_is)


def test_nonsense_is_refused_by_name() -> None:
    rank_pool(2).run(ownership.check_nonsense)


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", ownership.ROUNDS)
def test_200_rounds_leave_nothing(path: str) -> None:
    rank_pool(2).run(ownership.check_rounds_of, path, timeout=280)


@pytest.mark.parametrize("control", unguarded.CONTROLS)
def test_control(control: str) -> None:
    """The same checks fail without the guard that each is about."""
    pool = RankPool(2)  # harmed: threads that wait for ever, monitors that have ended
    try:
        with pytest.raises(RanksFailed, match=unguarded.CONTROLS[control][3]):
            pool.run(unguarded.check_without, control)
    finally:
        pool.discard()
