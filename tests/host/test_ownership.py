"""Copies, other processes, threads and signals, and a monitor that outlives what it calls; each with its control."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from common.cases import ownership, unguarded
from common.cases.ends import SMALL, held
from common.cases.lifecycle import make_fail
from common.ranks import RankPool, RanksFailed, rank_pool
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory.vote import hooks


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


def checkpointed(rank: Any, kept: Any) -> None:
    rank.barrier()
    kept.checkpoint_prepare()
    kept.checkpoint_restore(rank.group)


def refused(rank: Any, kept: Any) -> None:
    """Before anything is mapped."""
    with pytest.raises(BringUpError, match="differs"):
        rank.new_workspace(**{**SMALL, "max_tokens": 8 + 8 * rank.rank})


@contextlib.contextmanager
def refusing_at_the_end(rank: Any) -> Iterator[None]:
    """Rank 1 fails when all memory is mapped, and rank 0 has its handle."""

    def enter(step: str) -> None:
        if step == "ready" and rank.rank == 1:
            raise OSError("injected")

    with mock.patch.object(hooks, "enter", enter), pytest.raises(BringUpError, match="injected"):
        yield


def refused_at_the_end(rank: Any, kept: Any) -> None:
    with refusing_at_the_end(rank):
        rank.new_workspace(**SMALL)


def closed_after_a_fault(rank: Any, kept: Any) -> None:
    workspace = rank.new_workspace(**SMALL, deadline=0.02)
    if rank.rank == 0:
        make_fail(rank, workspace)
    rank.barrier()
    workspace.close()


def woken_alone(rank: Any, kept: Any) -> None:
    rank.barrier()
    kept.sleep()
    if rank.rank == 0:
        with pytest.raises(BringUpError):
            kept.wake(rank.group, timeout=0.03)
    rank.barrier()
    kept.wake(rank.group)


def woken_in_vain(rank: Any, kept: Any) -> None:
    rank.barrier()
    kept.sleep()
    with refusing_at_the_end(rank):
        kept.wake(rank.group)
    kept.wake(rank.group)


# What a round does, of ways beside `ownership.ROUNDS`; not there, as what GPUs ran is recorded with that file.
FURTHER: dict[str, Callable[[Any, Any], None]] = {
    "checkpoint": checkpointed,
    "refused": refused,
    "refused at the end": refused_at_the_end,
    "close after a fault": closed_after_a_fault,
    "wake alone": woken_alone,
    "wake in vain": woken_in_vain,
}


def count() -> tuple[int, ...]:
    """Descriptors, mappings of shared memory, threads."""
    return (*held(), threading.active_count())


def leave_nothing(rank: Any, way: str, rounds: int = 200, plant: str = "") -> None:
    """As `ownership.check_rounds_of`. plant: what each round is made to leave."""
    kept = rank.new_workspace(**SMALL)
    for number in range(rounds + 5):
        if number == 5:
            rank.barrier()
            before = count()
            rank.barrier()  # a peer that goes on takes its connection away
        FURTHER[way](rank, kept)
        if plant and number >= 5:
            PLANTED[plant]()
    rank.barrier()
    ownership.until(lambda: ownership.is_no_more(count(), before), f"{before} became {count()}")
    rank.barrier()
    kept.close()


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", FURTHER)
def test_200_further_rounds_leave_nothing(way: str) -> None:
    rank_pool(2).run(leave_nothing, way, timeout=280)


def leave_a_mapping() -> None:
    libc = ctypes.CDLL(None)  # `mmap.mmap` would keep a descriptor, too
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    descriptor = os.memfd_create("planted")
    libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    os.close(descriptor)


PLANTED: dict[str, Callable[[], object]] = {
    "descriptor": lambda: os.open(os.devnull, os.O_RDONLY),
    "mapping": leave_a_mapping,
    "thread": lambda: threading.Thread(target=threading.Event().wait, daemon=True).start(),
}


def finds(rank: Any, plant: str) -> None:
    with mock.patch.object(ownership, "PATIENCE", 1.0):
        leave_nothing(rank, "checkpoint", 1, plant)


@pytest.mark.parametrize("plant", PLANTED)
def test_what_one_round_leaves_is_found(pool: RankPool, plant: str) -> None:
    """The control: of its kind alone there is one more."""
    with pytest.raises(RanksFailed, match=r"AssertionError: \(\d+, \d+, \d+\) became") as failed:
        pool.run(finds, plant)
    for counts in re.findall(r"AssertionError: \((.*)\) became \((.*)\)", str(failed.value)):
        before, after = ([int(each) for each in text.split(",")] for text in counts)
        assert [a - b for a, b in zip(after, before, strict=True)] == [each == plant for each in PLANTED]


@pytest.mark.parametrize("control", unguarded.CONTROLS)
def test_control(control: str) -> None:
    """The same checks fail without the guard that each is about."""
    pool = RankPool(2)  # harmed: threads that wait for ever, monitors that have ended
    try:
        with pytest.raises(RanksFailed, match=unguarded.CONTROLS[control][3]):
            pool.run(unguarded.check_without, control)
    finally:
        pool.discard()
