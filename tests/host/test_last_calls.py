"""A rank leaves after its last call: that one and all before it are completed by the others, with right bits, however
far behind they are; the first later one ends at once, with the reason; and if there is none, nothing is said."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from common.cases import gone
from common.cases.calls import Call, Prepared
from common.ranks import RankPool

LIMIT, SECOND = 10.0, 1.0  # seconds for a later call: any, and the sooner of two, as a machine may stand still once
# The last one in one-shot, which a rank can complete while another one is held up in it.
CALLS = [Call(tokens=1 + number, strategy=number % 2, seed=number) for number in range(7)]


@dataclass
class Told:
    """How another rank fared. made: calls that were completed. wrong: of their bits. early: what was said of any fault
    before a later call. later: the error of that one, whom it names, its text, seconds."""

    made: int = 0
    wrong: list[str] = field(default_factory=list)
    early: str = ""
    later: gone.Told | None = None


@pytest.fixture
def pool() -> Iterator[RankPool]:
    """Three ranks of our own, one of which may end."""
    pool = RankPool(3)
    yield pool
    pool.discard()


def problems(told: Told, how: str, victim: int, later: bool) -> list[str]:
    """What is wrong with that, where `victim` has made all CALLS, and the other one more if `later`."""
    found = [*told.wrong]
    if told.made != len(CALLS):
        found.append(f"{told.made} calls were completed, wanted {len(CALLS)}")
    if told.early:
        found.append(f"told before a later call: {told.early}")
    if later:
        kind, peer, text, seconds = told.later or ("no error", -1, "", 0.0)
        if (kind, peer) != ("PeerGone", victim) or f"rank {victim} {gone.LEAVES[how]}" not in text:
            found.append(f"a later call: {kind}, of rank {peer}: {text}")
        if seconds > LIMIT:
            found.append(f"a later call took {seconds:.2f} s")
    return found


def leave(workspace: Any, how: str) -> None:
    if how == "exit":
        multiprocessing.util._exit_function()  # as a child of multiprocessing ends
        os._exit(0)
    getattr(workspace, how)()


def leave_without_a_word(workspace: Any, how: str) -> None:
    workspace._memory.lifeline._has_left = True
    workspace._memory.lifeline.end()


def leave_as_if_after_more_calls(workspace: Any, how: str) -> None:
    line = workspace._memory.lifeline
    epoch = line.next_epoch()
    line.next_epoch = lambda: epoch + 3
    leave(workspace, how)


def round_of(
    rank: Any, victim: int, how: str, later: bool, deadline: float = 60.0, leave: Callable[[Any, str], None] = leave
) -> Told:
    """`victim` makes CALLS, and leaves. The next rank is held up inside the last of them until it has heard of that
    and its monitor has had time to do what it must not. The third one is not, and has its later call meanwhile."""
    workspace, told = rank.new_workspace(max_tokens=8, hidden=64, deadline=deadline), Told()
    is_behind = rank.rank == (victim + 1) % rank.world_size
    prepared = [Prepared(rank, call) for call in CALLS]
    rank.barrier()
    with gone.Log() as log:
        try:
            for number, each in enumerate(prepared):
                if number == len(CALLS) - 1 and rank.rank != victim:
                    hold_up(rank, workspace, victim) if is_behind else rank.store.wait(["held up"])
                each.launch(workspace.handle)
                told.made += 1
                told.wrong += each.wrong()
            if rank.rank == victim:
                leave(workspace, how)
            elif is_behind or not later:
                gone.until(lambda: has_heard(workspace, victim), "nothing is heard")
                time.sleep(gone.HEARD)
                told.early = str(gone.told(workspace) or log or "")
        except RuntimeError as error:
            told.early = str(error)
        if rank.rank != victim and later:
            began = time.monotonic()
            found = gone.call_in_vain(rank, workspace)
            told.later = *found[:3], found[3] - began
    rank.store.add("over", 1)
    gone.until(lambda: rank.store.add("over", 0) >= rank.world_size - (how == "exit"), "the others do not end")
    workspace.close(force=True)
    return told


def hold_up(rank: Any, workspace: Any, victim: int) -> None:
    """In the next call: a signal's handler runs during its wait."""
    before = gone.begun(workspace, rank.rank)

    def handler(*_: object) -> None:
        if gone.begun(workspace, rank.rank) == before:  # not in it yet
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        rank.store.set("held up", "")
        gone.until(lambda: has_heard(workspace, victim), "nothing is heard")
        time.sleep(gone.HEARD)

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def has_heard(workspace: Any, victim: int) -> bool:
    return workspace._memory.lifeline._quiet[victim] is not None


def of_the_others(pool: RankPool, victim: int, how: str, later: bool, *more: Any) -> list[Told]:
    outcomes = pool.start(round_of, victim, how, later, *more).outcomes(80)
    ended = [rank for rank, (ok, _) in enumerate(outcomes) if not ok]
    assert ended == [victim] * (how == "exit"), outcomes
    return [outcome.value for rank, outcome in enumerate(outcomes) if rank != victim]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("how", "later"), [("close", True), ("sleep", True), ("exit", True), ("exit", False)])
def test_only_later_calls_end(pool: RankPool, how: str, victim: int, later: bool, record_property: Any) -> None:
    """Without a later one nothing is said at all: that end was normal, and so is the others'."""
    others = of_the_others(pool, victim, how, later)
    assert [problems(told, how, victim, later) for told in others] == [[], []]
    if later:
        took = [told.later[3] for told in others if told.later]
        assert min(took) < SECOND, took
        record_property("seconds", took)


def test_control_without_a_word_it_is_said_too_early(pool: RankPool) -> None:
    """As a death is, at once, whatever has been completed: also on the rank that is held up in the last call."""
    behind = of_the_others(pool, 1, "close", False, 60.0, leave_without_a_word)[1]
    assert problems(behind, "close", 1, False) == [f"told before a later call: {behind.early}"]
    assert "the process of rank 1 has died" in behind.early


def test_control_after_a_wrong_epoch_a_later_call_waits_for_the_deadline(pool: RankPool) -> None:
    others = of_the_others(pool, 1, "close", True, 2.0, leave_as_if_after_more_calls)
    for told in others:
        (found,) = problems(told, "close", 1, True)
        assert found.startswith(("a later call: PeerTimeout", "a later call: WorkspaceBroken")), found
    assert max(told.later[3] for told in others if told.later) > 1.5


def test_control_a_call_less_is_noticed() -> None:
    assert problems(Told(made=len(CALLS) - 1), "close", 1, False) == ["6 calls were completed, wanted 7"]
