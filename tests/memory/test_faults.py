"""Whatever goes wrong, wherever, however: all survivors say the same within the timeout, and nothing is left."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from memory import faults, ranks
from memory.test_allocate import make
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory.vote import Outcome, Participant, Verdict, hooks

SIZE = 4
PARALLEL = 3
STALL_TIMEOUT = 2.0  # in which a busy machine comes to the step; the others sleep through it
MARGIN = 3.0  # seconds after a timeout by which it must have been told
NOTICED = 10.0  # seconds, for what takes a tenth of one, and must not wait for the timeout of 20 s


def split(cases: list[Any], parts: int) -> list[list[Any]]:
    return [cases[start::parts] for start in range(parts)]


def check(case: tuple[str, int], told: list[Any], survivors: list[int], seconds: float) -> None:
    step, victim = case
    heard = {told[rank][0] for rank in survivors}
    assert len(heard) == 1, f"{case}: ranks disagree: {heard}"
    error = heard.pop()
    assert error is not None, f"{case}: nobody noticed"
    assert error[:2] == (victim, step), f"{case}: got {error}"
    assert error[2], "a cause is given"
    slowest = max(told[rank][1] for rank in survivors)
    assert slowest < seconds, f"{case}: took {slowest:.2f} s"


@pytest.mark.parametrize("mode", ["failure", "exception"])
@pytest.mark.parametrize("kind", ["host", "cuda", "multicast"])
def test_one_rank_fails(kind: str, mode: str) -> None:
    steps = faults.STEPS + (faults.MULTICAST_STEPS if kind == "multicast" else [])
    cases = [(step, victim) for step in steps for victim in range(SIZE)]
    told = ranks.values(ranks.launch(SIZE, faults.loop_body, kind, mode, cases, 20.0, seconds=120))
    for number, case in enumerate(cases):
        check(case, [results[number] for results in told], list(range(SIZE)), NOTICED)


@pytest.mark.parametrize("mode", ["failure", "exception"])
@pytest.mark.parametrize("kind", ["host", "cuda", "multicast"])
def test_one_rank_fails_in_a_restoration(kind: str, mode: str) -> None:
    cases = [(step, victim) for step in steps_of(kind, "restore") for victim in (0, 2)]
    told = ranks.values(ranks.launch(3, faults.loop_body, kind, mode, cases, 20.0, "restore"))
    for number, case in enumerate(cases):
        check(case, [results[number] for results in told], [0, 1, 2], NOTICED)


def run_stalls(kind: str, cases: list[tuple[str, int]], purpose: str = "allocate") -> None:
    def run(part: list[tuple[str, int]]) -> None:
        arguments = (kind, "stall", part, STALL_TIMEOUT, purpose)
        told = ranks.values(ranks.launch(SIZE, faults.loop_body, *arguments, seconds=200))
        for number, (step, victim) in enumerate(part):
            everyone = [results[number] for results in told]
            awake = [rank for rank in range(SIZE) if rank != victim]
            check((step, victim), everyone, awake, STALL_TIMEOUT + MARGIN)
            slept = 1.4 * STALL_TIMEOUT
            check((step, victim), everyone, [victim], slept + MARGIN)  # the sleeper itself says it was too late

    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(run, split(cases, PARALLEL)))


def test_one_rank_stalls() -> None:
    run_stalls("host", [(step, victim) for step in faults.STEPS for victim in (0, 2)])


def test_one_rank_stalls_in_a_restoration() -> None:
    run_stalls("host", in_turn(faults.RESTORE_STEPS), "restore")


@pytest.mark.parametrize("purpose", ["allocate", "restore"])
@pytest.mark.parametrize("kind", ["cuda", "multicast"])
def test_one_rank_stalls_on_a_gpu(kind: str, purpose: str) -> None:
    run_stalls(kind, in_turn(steps_of(kind, purpose)) + [("multicast map", 0)] * (kind == "multicast"), purpose)


@pytest.mark.exhaustive
@pytest.mark.parametrize("purpose", ["allocate", "restore"])
@pytest.mark.parametrize("kind", ["host", "cuda", "multicast"])
def test_one_rank_stalls_everywhere(kind: str, purpose: str) -> None:
    run_stalls(kind, [(step, victim) for step in steps_of(kind, purpose) for victim in range(SIZE)], purpose)


def steps_of(kind: str, purpose: str) -> list[str]:
    if kind == "multicast":
        return faults.MULTICAST_STEPS
    return faults.RESTORE_STEPS if purpose == "restore" else faults.STEPS


def in_turn(steps: list[str]) -> list[tuple[str, int]]:
    """Each step once, the coordinator and another rank by turns. Every rank at every step: what `everywhere` is."""
    return [(step, 2 * (number % 2)) for number, step in enumerate(steps)]


def run_kills(kind: str, cases: list[tuple[str, int]], size: int = SIZE, purpose: str = "allocate") -> None:
    def run(case: tuple[str, int]) -> None:
        ends = ranks.launch(size, faults.last_words_body, kind, *case, 20.0, purpose)
        assert ends[case[1]].exitcode == -signal.SIGKILL
        survivors = [rank for rank in range(size) if rank != case[1]]
        ranks.values([ends[rank] for rank in survivors])
        check(case, [end.value for end in ends], survivors, NOTICED)  # noticed, not waited for

    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(run, cases))


def test_one_rank_is_killed() -> None:
    run_kills("host", [(step, victim) for step in faults.STEPS for victim in range(3)], size=3)


@pytest.mark.parametrize("kind", ["host", "cuda"])
def test_one_rank_is_killed_in_a_restoration(kind: str) -> None:
    run_kills(kind, in_turn(faults.RESTORE_STEPS), 3, "restore")


@pytest.mark.parametrize(("kind", "purpose"), [("cuda", "allocate"), ("multicast", "restore")])
def test_one_rank_of_four_is_killed(kind: str, purpose: str) -> None:
    """What the tests beside this one leave out, each step once."""
    run_kills(kind, in_turn(steps_of(kind, purpose)), purpose=purpose)


@pytest.mark.exhaustive
@pytest.mark.parametrize("purpose", ["allocate", "restore"])
@pytest.mark.parametrize("kind", ["host", "cuda", "multicast"])
def test_one_rank_is_killed_everywhere(kind: str, purpose: str) -> None:
    run_kills(kind, [(step, victim) for step in steps_of(kind, purpose) for victim in range(SIZE)], purpose=purpose)


def test_one_rank_is_killed_with_multicast() -> None:
    run_kills("multicast", [(step, 1) for step in faults.MULTICAST_STEPS], size=3)


UNDO = [("multicast undo", victim) for victim in (0, 2)]


@pytest.mark.parametrize("mode", ["failure", "exception"])
def test_one_rank_fails_while_multicast_is_given_up(mode: str) -> None:
    told = ranks.values(ranks.launch(3, faults.loop_body, "auto", mode, UNDO, 20.0))
    for number, case in enumerate(UNDO):
        check(case, [results[number] for results in told], [0, 1, 2], NOTICED)
        assert "not multicast, since rank 1 failed at multicast bind" in told[0][number][0][2]


def test_one_rank_stalls_while_multicast_is_given_up() -> None:
    run_stalls("auto", UNDO)


def test_one_rank_is_killed_while_multicast_is_given_up() -> None:
    run_kills("auto", UNDO, 3)


def absent_body(rank: int, size: int, store: dist.Store, absent: int) -> Any:
    group = ranks.group(store, "first", rank, size)
    told = faults.attempt(group, "host", STALL_TIMEOUT, {}) if rank != absent else (None, 0.0)
    ranks.meet(store, "all gave up", size)
    assert faults.attempt(group, "host", 20.0, {})[0] is None  # and can meet again over the same group
    return told


@pytest.mark.parametrize("absent", [0, 2])
def test_one_rank_never_comes(absent: int) -> None:
    told = ranks.values(ranks.launch(3, absent_body, absent))
    check(("rendezvous", absent), told, [rank for rank in range(3) if rank != absent], STALL_TIMEOUT + MARGIN)


def stop_body(rank: int, size: int, store: dist.Store, step: str, victim: int) -> Any:
    group = ranks.group(store, "first", rank, size)
    faults.make(group, "host", 20.0).close()
    store.set(f"pid{rank}", str(os.getpid()))
    ranks.meet(store, "ready to stop", size)
    told = faults.attempt(group, "host", STALL_TIMEOUT, {step: "stop"} if rank == victim else {})
    if rank == (victim + 1) % size:
        os.kill(int(store.get(f"pid{victim}")), signal.SIGCONT)
    ranks.meet(store, "all gave up", size)
    assert faults.attempt(group, "host", 20.0, {})[0] is None
    return told


@pytest.mark.parametrize(("step", "victim"), [("exchange", 0), ("exchange", 1), ("ready", 2)])
def test_one_rank_is_stopped_and_continued(step: str, victim: int) -> None:
    told = ranks.values(ranks.launch(3, stop_body, step, victim))
    check((step, victim), told, [rank for rank in range(3) if rank != victim], STALL_TIMEOUT + MARGIN)
    assert told[victim][0][:2] == (victim, step)


def use_body(rank: int, size: int, store: dist.Store, how: str) -> tuple[str, int]:
    """Rank 1 is interrupted while it waits for the last verdict, or cannot undo what `use` made when rank 2 fails.
    Returns the error, and how often `use` was undone."""
    group = ranks.group(store, "first", rank, size)
    undone: list[bytes] = []

    def use(pointers: tuple[int, ...], multicast_pointer: int) -> Callable[[], object]:
        if how == "cannot undo" and rank == 2:
            raise RuntimeError("injected")
        return lambda: undo(pointers[rank])

    def undo(pointer: int) -> None:
        undone.append(ctypes.string_at(pointer, 4))  # a segmentation fault if the memory had gone first
        if how == "cannot undo" and rank == 1:
            raise RuntimeError("cannot be undone")

    def interrupt(self: Participant, step: str, outcome: Outcome) -> Verdict:
        if step == "ready":
            raise KeyboardInterrupt
        return vote(self, step, outcome)

    vote = Participant.vote
    before = ranks.census()
    with (
        mock.patch.object(Participant, "vote", interrupt if how == "interrupted" and rank == 1 else vote),
        pytest.raises((BringUpError, KeyboardInterrupt)) as caught,
    ):
        make(group, use=use)
    ranks.meet(store, "failed", size)
    faults.check_census(before, how)
    return str(caught.value), len(undone)


def test_what_was_made_of_the_memory_goes_first_when_interrupted() -> None:
    told = ranks.values(ranks.launch(3, use_body, "interrupted"))
    assert told[1] == ("", 1)
    assert told[0] == told[2]
    assert "rank 1 at step 'ready': its process died or gave up" in told[0][0]
    assert told[0][1] == 1


def test_what_cannot_be_undone_does_not_hide_the_error() -> None:
    told = ranks.values(ranks.launch(3, use_body, "cannot undo"))
    assert {error for error, _ in told} == {told[0][0]}
    assert "rank 2 at step 'ready': RuntimeError: injected" in told[0][0]
    assert [undone for _, undone in told] == [1, 1, 0]


def unvoted_body(rank: int, size: int, store: dist.Store, step: str) -> Any:
    group = ranks.group(store, "first", rank, size)
    hooks.voting = False
    return faults.attempt(group, "host", 2.0, {step: "failure"} if rank == 1 else {})


@pytest.mark.parametrize("step", ["allocate", "map", "verify", "ready"])
def test_without_the_vote_ranks_diverge(step: str) -> None:
    """The negative control: what the other tests see is due to the vote."""
    start = time.monotonic()
    told = ranks.values(ranks.launch(3, unvoted_body, step))
    assert len({answer and answer[:2] for answer, _ in told}) > 1, told
    assert time.monotonic() - start < 60
