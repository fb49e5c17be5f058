"""Memory that is bound to a multicast object: no rank unbinds it while another may still send, and in the end all do.

By the simulated driver, for which a store to a team with an unbound member is an error of who stores. Each case has its
control: with `parting.keep` giving back at once, as if there were only unicast, the late rank's store fails.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from memory import faults, ranks
from memory.simulated_driver import SimulatedDriver, allow_simulated_multicast
from memory.test_allocate import check_content, check_shared, make
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory import DriverError, Fill, SymmetricMemory, lifeline, parting
from mnnvl_ar.memory.lifeline import CHECKPOINT
from mnnvl_ar.memory.vote import Coordinator, Outcome, Participant, Verdict, Voter

PATIENCE = 20.0
QUIET = 0.15  # seconds in which what must not happen would have happened, seven times over
WHILE = 4.0  # seconds until a rank that has ended without closing counts as gone
PLACE = 90_400
UNBOUND = "a member of the team is not bound there"
INSTEAD = (Fill(0, 4096, 7),)


def until(is_so: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def at_once(_: object, __: lifeline.Lifeline, give_back: Callable[[], object]) -> None:
    """In place of `parting.keep`: the control."""
    give_back()


def made(group: dist.ProcessGroup, rank: int, **options: Any) -> tuple[SymmetricMemory, SimulatedDriver]:
    driver = SimulatedDriver(rank, multicast=True)
    memory = make(group, device=torch.device("cuda", 0), transport="multicast", driver=driver, **options)
    return memory, driver


def check_send(memory: SymmetricMemory, driver: SimulatedDriver, word: int) -> None:
    """A store to the multicast address comes to our own memory, too. Each rank has a place of its own."""
    place = PLACE + 16 * memory.rank
    driver.multicast_store(memory.multicast_pointer + place, word)
    assert ctypes.string_at(memory.pointers[memory.rank] + place, 16) == word.to_bytes(4, "little") * 4


def leave(memory: SymmetricMemory, how: str) -> None:
    memory.close() if how == "close" else memory.drop()


def left_over(memory: SymmetricMemory, how: str, stands_in: bool = False) -> dict[str, int]:
    if how == "close":
        return {}
    return {"context": 1, "reservations": 2, **({"maps": memory.world_size} if stands_in else {})}


def every_order_body(rank: int, size: int, store: dist.Store, hows: tuple[str, ...], early: bool = False) -> list[str]:
    """All orders in which ranks go, the last of which is the late one; it sends after each. What the late one met."""
    allow_simulated_multicast()
    group, met = ranks.group(store, "first", rank, size), []
    orders = list(itertools.permutations(range(size)))
    for number, (order, ways) in enumerate(itertools.product(orders, itertools.product(hows, repeat=size))):
        late, stands_in = order[-1], number % 2 == 1
        with mock.patch.object(parting, "keep", at_once if early else parting.keep):
            memory, driver = made(group, rank)
            memory.stand_in = lambda: INSTEAD if stands_in else ()  # noqa: B023
            error = ""
            for turn, goes in enumerate(order[:-1]):
                if rank == goes:
                    leave(memory, ways[rank])
                    with pytest.raises(DriverError, match="no multicast address"):  # nothing leads there any more
                        driver.multicast_store(memory.multicast_pointer, 1)
                ranks.meet(store, f"{number} went {turn}", size)
                if rank == late:
                    try:
                        check_send(memory, driver, 100 + turn)
                    except DriverError as failed:
                        error = error or str(failed)
                ranks.meet(store, f"{number} sent {turn}", size)
            if not early:
                time.sleep(QUIET if number == 0 else 0.0)
                held = driver.held()
                assert held["bound"] == 1, (order, ways, held)
                if rank != late:
                    views = size if stands_in and ways[rank] == "sleep" else 0
                    assert held.get("maps", 0) == views, (order, ways, held)
                    assert held["handles"] == 2, "the memory, and the object that it is bound to"
            ranks.meet(store, f"{number} all but one", size)
            if rank == late:
                leave(memory, ways[rank])
            wanted = left_over(memory, ways[rank], stands_in)
            until(lambda: driver.held() == wanted, f"{order} {ways}: {driver.held()} is left")  # noqa: B023
            memory.close()
            until(lambda: not driver.held(), f"{order} {ways}: {driver.held()} is left behind close")  # noqa: B023
        met.append(error)
        ranks.meet(store, f"{number} over", size)
    return [error for error in met if error] if early else met


def test_ranks_go_in_every_order_while_one_sends() -> None:
    """Six orders by eight ways: each of three ranks sleeps or closes."""
    for met in ranks.values(ranks.launch(3, every_order_body, ("close", "sleep"), seconds=300)):
        assert met == [""] * 48


@pytest.mark.parametrize("how", ["close", "sleep"])
def test_control_unbound_at_once_the_late_rank_fails(how: str) -> None:
    met = ranks.values(ranks.launch(3, every_order_body, (how,), True, seconds=120))
    assert sum(len(errors) for errors in met) == 6, "each rank is late twice"
    assert all(UNBOUND in error for errors in met for error in errors), met


def news_body(rank: int, size: int, store: dist.Store) -> str:
    """Rank 2 is late. A rank that takes one word, that of rank 0, for all unbinds too early: another control."""
    allow_simulated_multicast()
    memory, driver = made(ranks.group(store, "first", rank, size), rank)

    def mistaken(self: lifeline.Lifeline) -> list[int]:
        return [] if len([since for since in self._quiet.values() if since is not None]) else [0]

    error = ""
    with mock.patch.object(lifeline.Lifeline, "_staying", mistaken):
        if rank != 2:
            memory.close()
            until(lambda: not driver.held(), "it is not mistaken")
        ranks.meet(store, "two of three went", size)
        if rank == 2:
            with pytest.raises(DriverError) as caught:
                check_send(memory, driver, 1)
            error = str(caught.value)
        memory.close()
    return error


def test_control_one_word_is_not_all() -> None:
    assert UNBOUND in ranks.values(ranks.launch(3, news_body))[2]


def rounds_body(rank: int, size: int, store: dist.Store, rounds: int, deaf: bool) -> None:
    allow_simulated_multicast()
    group = ranks.group(store, "first", rank, size)
    drivers: list[SimulatedDriver] = []

    def once(number: int) -> None:
        memory, driver = made(group, rank)
        drivers.append(driver)
        driver.multicast_store(memory.multicast_pointer + PLACE, number)
        if number % 3 == rank:
            memory.drop()
        memory.close()

    for number in range(5):
        once(number)
    until(lambda: not parting._kept, "what was kept for the first rounds")
    ranks.meet(store, "warm", size)
    before = ranks.census()
    with mock.patch.object(lifeline.Lifeline, "all_have_left", return_value=False) if deaf else mock.MagicMock():
        for number in range(rounds):
            once(number)
        if deaf:
            with pytest.raises(AssertionError, match="'fds'"):
                faults.check_census(before, "deaf", patience=1.0)
    until(lambda: not parting._kept, "something is still kept")
    ranks.meet(store, "done", size)
    faults.check_census(before, f"{rounds} rounds")
    assert not [held for driver in drivers if (held := driver.held())]


def test_200_rounds_leak_nothing() -> None:
    ranks.values(ranks.launch(2, rounds_body, 200, False, seconds=300))


def test_control_who_hears_nothing_leaks() -> None:
    ranks.values(ranks.launch(2, rounds_body, 5, True))


def end_body(rank: int, size: int, store: dist.Store, how: str, pause: float) -> float:
    """Rank 1 ends, killed or in good order, without having closed; the others close before. Seconds until they have
    given back, from its end."""
    allow_simulated_multicast()
    lifeline._LAST_SECONDS = pause
    memory, driver = made(ranks.group(store, "first", rank, size), rank)
    if rank != 1:
        memory.close()
    ranks.meet(store, "closed", size)
    time.sleep(QUIET)
    if rank == 1:
        check_send(memory, driver, 5)
        if how == "exits":
            lifeline._exit()
            ranks.meet(store, "says that it ends", size)
            check_send(memory, driver, 6)  # its calls may still run
        store.set("ends", str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits":
        ranks.meet(store, "says that it ends", size)
    ends = float(store.get("ends").decode())
    until(lambda: not driver.held(), f"{driver.held()} is kept")
    return time.monotonic() - ends


@pytest.mark.parametrize("how", ["is killed", "exits"])
def test_who_ends_without_closing_is_waited_for_a_while_longer(how: str) -> None:
    ends = ranks.launch(3, end_body, how, WHILE)
    assert ends.pop(1).exitcode == -signal.SIGKILL
    assert all(took >= WHILE for took in ranks.values(ends)), ends


def test_control_without_that_while_it_goes_with_the_connection() -> None:
    ends = ranks.launch(3, end_body, "is killed", 0.0)
    assert min(ends[0].value, ends[2].value) < WHILE


def looks_on() -> bool:
    """Whether a thread of `parting` is there."""
    return any("parting" in thread.name for thread in threading.enumerate())


def quiet_end_body(rank: int, size: int, store: dist.Store, ends: bool) -> tuple[list[str], bool]:
    """Ranks end with their process while rank 0 never goes: nothing is unbound by hand, nothing waits. What was
    unbound, and whether a thread still looks on."""
    allow_simulated_multicast()
    memory, driver = made(ranks.group(store, "first", rank, size), rank)
    if rank != 0:
        memory.close()
    if ends:
        parting._end()  # as at exit
    ranks.meet(store, "ended", size)
    if rank == 0:
        check_send(memory, driver, 9)
    ranks.meet(store, "sent", size)
    return [call for call in driver.calls if "unbind" in call], looks_on()


def test_the_end_of_a_process_unbinds_nothing_itself() -> None:
    assert ranks.values(ranks.launch(3, quiet_end_body, True)) == [([], False)] * 3


def test_control_a_thread_that_looks_on_is_seen() -> None:
    assert [looks for _, looks in ranks.values(ranks.launch(3, quiet_end_body, False))] == [False, True, True]


def recover_body(rank: int, size: int, store: dist.Store, late: int, early: bool) -> str:
    """All but one come to a recovery; that one sends, and comes then."""
    allow_simulated_multicast()
    group, error = ranks.group(store, "first", rank, size), ""
    with mock.patch.object(parting, "keep", at_once if early else parting.keep):
        memory, driver = made(group, rank)
        pointers, held = (memory.pointers, memory.multicast_pointer), driver.held()
        if rank == late:
            until(lambda: store.add("quiet", 0) == size - 1, "they do not come")
            time.sleep(QUIET)
            try:
                check_send(memory, driver, 3)
            except DriverError as failed:
                error = str(failed)
        memory.restore(group, 20.0, quiesce=lambda: store.add("quiet", 1))
        assert (memory.pointers, memory.multicast_pointer) == pointers
        assert driver.held() == held, "of what there was before nothing is left"
        check_content(memory)
        check_shared(memory, group)
        check_send(memory, driver, rank + 1)
        dist.barrier(group)
        memory.close()
        until(lambda: not driver.held(), "something is kept")
    return error


@pytest.mark.parametrize("late", [0, 2])
def test_recovery_unbinds_when_all_have_come(late: int) -> None:
    assert ranks.values(ranks.launch(3, recover_body, late, False)) == [""] * 3


def test_control_recovery_that_unbinds_first() -> None:
    assert UNBOUND in ranks.values(ranks.launch(3, recover_body, 2, True))[2]


def busy_body(rank: int, size: int, store: dist.Store) -> None:
    """Rank 1 cannot end its calls: the recovery fails for all, and its calls may go on."""
    allow_simulated_multicast()
    group = ranks.group(store, "first", rank, size)
    memory, driver = made(group, rank)
    held = driver.held()

    def quiesce() -> None:
        if rank == 1:
            raise RuntimeError("a graph is being captured")

    for tries in range(2):
        with pytest.raises(BringUpError, match="rank 1 at step 'prepare'"):
            memory.restore(group, 20.0, quiesce)
        ranks.meet(store, f"failed {tries}", size)
        time.sleep(QUIET)
        assert driver.held()["bound"] == 1
        assert memory._block.is_exposed == (rank == 1), "the others have left, and keep what they had"
        if rank == 1:
            check_send(memory, driver, 4)
        ranks.meet(store, f"sent {tries}", size)
    memory.restore(group, 20.0)
    assert driver.held() == held
    check_content(memory)
    check_shared(memory, group)
    memory.close()
    until(lambda: not driver.held(), "something is kept")


def test_a_rank_that_cannot_come_may_go_on_sending() -> None:
    ranks.values(ranks.launch(3, busy_body))


def checkpoint_body(rank: int, size: int, store: dist.Store) -> list[int]:
    """Rank 1 is late: the others are told, and ask again."""
    allow_simulated_multicast()
    group = ranks.group(store, "first", rank, size)
    dist.barrier(group)
    before = ranks.census()
    memory, driver = made(group, rank)
    if rank != 1:
        memory.drop(CHECKPOINT)
        until(lambda: memory.lifeline.staying() == [1], "it does not hear of the other one")
    staying = memory.await_parting(0.3) if rank != 1 else [1]
    ranks.meet(store, "asked", size)
    if rank == 1:
        check_send(memory, driver, 8)
        memory.drop(CHECKPOINT)
    assert memory.await_parting(PATIENCE) == []
    faults.check_census(before, "nothing is left for a checkpoint, no thread and no descriptor")
    assert not looks_on()
    memory.restore(group, 20.0)
    check_content(memory)
    dist.barrier(group)
    memory.close()
    until(lambda: not driver.held(), "something is kept")
    return staying


def test_a_checkpoint_waits_and_names_who_is_late() -> None:
    assert ranks.values(ranks.launch(3, checkpoint_body)) == [[1]] * 3


def failed_before_body(rank: int, size: int, store: dist.Store) -> tuple[list[int], list[int]]:
    """Rank 2 is late in a recovery, which fails. What the others keep of that is kept for a checkpoint, too."""
    allow_simulated_multicast()
    group, late = ranks.group(store, "first", rank, size), False

    class Late(SimulatedDriver):
        def multicast_store(self, address: int, word: int) -> None:
            if late:
                until(lambda: store.add("asked", 0) == size - 1, "they do not ask")
            super().multicast_store(address, word)

    driver = Late(rank, multicast=True)
    memory = make(group, device=torch.device("cuda", 0), transport="multicast", driver=driver)
    late = rank == 2
    with pytest.raises(BringUpError, match="no answer from rank 2"):
        memory.restore(group, 5.0)
    memory.drop(CHECKPOINT)
    if rank != 2:
        until(lambda: memory.await_parting(0.0) == [2], "it does not hear of the other one")
    staying = memory.await_parting(0.3) if rank != 2 else [2]
    store.add("asked", int(rank != 2))
    return staying, memory.await_parting(PATIENCE)


def test_a_checkpoint_waits_for_what_a_failed_recovery_has_kept() -> None:
    assert ranks.values(ranks.launch(3, failed_before_body)) == [([2], [])] * 3


def between_body(rank: int, size: int, store: dist.Store, victim: int, early: bool) -> tuple[str, str]:
    """One rank is interrupted when all have voted that the multicast is mapped; the others store then."""
    allow_simulated_multicast()
    group, met = ranks.group(store, "first", rank, size), ""
    kind: type[Voter] = Coordinator if rank == 0 else Participant
    vote = kind.vote

    class Driver(SimulatedDriver):
        def multicast_store(self, address: int, word: int) -> None:
            nonlocal met
            until(lambda: store.add("left", 0) > 0, "it does not leave")
            try:
                super().multicast_store(address, word)
            except DriverError as failed:
                met = str(failed)
                raise

    def interrupted(self: Voter, step: str, outcome: Outcome) -> Verdict:
        verdict = vote(self, step, outcome)
        if step == "multicast map" and rank == victim:
            raise KeyboardInterrupt
        return verdict

    driver = Driver(rank, multicast=True)
    with (
        mock.patch.object(parting, "keep", at_once if early else parting.keep),
        mock.patch.object(kind, "vote", interrupted),
        pytest.raises((BringUpError, KeyboardInterrupt)) as caught,
    ):
        make(group, device=torch.device("cuda", 0), transport="multicast", driver=driver, timeout=10.0)
    store.add("left", int(rank == victim))
    until(lambda: not driver.held(), f"{driver.held()} is kept")
    return str(caught.value), met


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_leaves_between_two_votes_stays_bound(victim: int) -> None:
    told = ranks.values(ranks.launch(3, between_body, victim, False))
    assert told.pop(victim) == ("", "")
    for text, met in told:
        assert f"rank {victim} at step 'multicast write': its process died or gave up" in text
        assert met == ""


@pytest.mark.parametrize("victim", [0, 2])
def test_control_a_rank_that_leaves_between_two_votes_and_unbinds(victim: int) -> None:
    told = ranks.values(ranks.launch(3, between_body, victim, True))
    assert any(UNBOUND in met for _, met in told), told


def stall_body(rank: int, size: int, store: dist.Store, victim: int, early: bool) -> tuple[str, str, str]:
    """One rank is so late in a bring-up that the others have given it up; then it stores its nonce."""
    allow_simulated_multicast()
    group, timeout = ranks.group(store, "first", rank, size), 5.0
    driver, met = SimulatedDriver(rank, multicast=True), [""]

    class Late(SimulatedDriver):
        def multicast_store(self, address: int, word: int) -> None:
            until(lambda: store.add("gave up", 0) == size - 1, "they do not give up")
            time.sleep(QUIET)
            try:
                super().multicast_store(address, word)
            except DriverError as failed:
                met[0] = str(failed)
                raise

    if rank == victim:
        driver = Late(rank, multicast=True)
    with (
        mock.patch.object(parting, "keep", at_once if early else parting.keep),
        pytest.raises(BringUpError) as caught,
    ):
        make(group, device=torch.device("cuda", 0), transport="multicast", driver=driver, timeout=timeout)
    store.add("gave up", int(rank != victim))
    until(lambda: not driver.held(), f"{driver.held()} is kept")
    memory, driver = made(group, rank)  # and the same ranks may try again
    dist.barrier(group)
    memory.close()
    until(lambda: not driver.held(), "something is kept")
    return caught.value.step, caught.value.cause, met[0]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_bring_up_that_fails_waits_for_a_store_that_is_late(victim: int) -> None:
    for step, cause, met in ranks.values(ranks.launch(3, stall_body, victim, False)):
        assert step == "multicast write"
        assert f"no answer from rank {victim}" in cause
        assert met == ""


def test_control_a_bring_up_that_gives_back_at_once() -> None:
    assert UNBOUND in ranks.values(ranks.launch(3, stall_body, 2, True))[2][2]


def interrupt_body(rank: int, size: int, store: dist.Store, victim: int) -> str:
    """One rank is interrupted where it would vote on the stores."""
    allow_simulated_multicast()
    group = ranks.group(store, "first", rank, size)
    kind: type[Voter] = Coordinator if rank == 0 else Participant
    vote, driver = kind.vote, SimulatedDriver(rank, multicast=True)

    def interrupted(self: Voter, step: str, outcome: Outcome) -> Verdict:
        if step == "multicast write" and rank == victim:
            raise KeyboardInterrupt
        return vote(self, step, outcome)

    with mock.patch.object(kind, "vote", interrupted), pytest.raises((BringUpError, KeyboardInterrupt)) as caught:
        make(group, device=torch.device("cuda", 0), transport="multicast", driver=driver, timeout=10.0)
    until(lambda: not driver.held(), f"{driver.held()} is kept")
    return str(caught.value)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_bring_up_that_is_interrupted_leaves_nothing(victim: int) -> None:
    told = ranks.values(ranks.launch(3, interrupt_body, victim))
    assert told.pop(victim) == ""
    assert all(f"rank {victim} at step 'multicast write': its process died or gave up" in text for text in told), told


def fork_body(rank: int, size: int, store: dist.Store) -> None:
    """A child has what is kept neither to give back nor to listen for."""
    allow_simulated_multicast()
    memory, driver = made(ranks.group(store, "first", rank, size), rank)
    if rank == 0:
        memory.close()
        child = os.fork()
        if child == 0:
            os._exit(0 if not parting._kept and parting._thread is None and not memory.lifeline._connections else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ranks.meet(store, "forked", size)
    if rank == 1:
        check_send(memory, driver, 2)
    ranks.meet(store, "sent", size)
    memory.close()
    until(lambda: not driver.held(), "something is kept")


def test_a_forked_child_has_no_part_in_it() -> None:
    ranks.values(ranks.launch(2, fork_body))


class Silent:
    """A lifeline of a rank that has left, whose peers have not yet."""

    others = (1,)
    gone = False

    def look(self) -> list[lifeline.Gone]:
        return []

    def warnings(self) -> list[str]:
        return []

    def all_have_left(self) -> bool:
        return self.gone

    def staying(self) -> list[int]:
        return [] if self.gone else [1]

    def end(self) -> None:
        pass


@pytest.fixture
def silent() -> Iterator[Any]:
    """Nothing is kept before and after."""
    until(lambda: not parting._kept and not looks_on(), "what other tests have kept")
    made = Silent()
    yield made
    made.gone = True
    parting.look()
    parting._end()


def test_without_a_thread_the_next_look_gives_back(silent: Any) -> None:
    """As at the interpreter's end, or where a process may have no more threads."""
    given: list[int] = []
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        parting.keep("first", silent, lambda: given.append(1))
        assert parting.wait("first", 0.0) == [1]
    assert not looks_on()
    silent.gone = True
    parting.look()
    assert given == [1]
    silent.gone = False
    parting.keep("second", silent, lambda: given.append(2))
    assert looks_on()
    silent.gone = True
    until(lambda: given == [1, 2], "no thread has looked")


def test_a_thread_that_died_is_replaced(silent: Any) -> None:
    given: list[int] = []

    def fails() -> None:
        raise RuntimeError("as ordered")

    parting.keep("first", silent, fails)
    with mock.patch.object(threading, "excepthook"):
        silent.gone = True
        until(lambda: not looks_on(), "it goes on")
    assert not parting._kept, "what could not be given back is not tried again"
    parting.keep("second", silent, lambda: given.append(2))
    until(lambda: given == [2], "no thread has looked")


def test_where_nothing_is_heard_any_more_memory_stays_and_ranks_are_named(
    silent: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[int] = []
    monkeypatch.setattr(silent, "look", mock.Mock(side_effect=ValueError("as ordered")), raising=False)
    parting.keep("owner", silent, lambda: given.append(1))
    began = time.monotonic()
    assert parting.wait("owner", PATIENCE) == [1]
    assert time.monotonic() - began < PATIENCE / 2
    until(lambda: not looks_on(), "it looks on, for nothing")
    assert given == []
    assert caplog.text.count("nothing is heard of peers any more") == 1
    parting.settle("owner")  # ranks have met
    assert given == [1]
    assert parting.wait("owner", 0.0) == []


def test_a_child_that_is_forked_while_the_thread_wakes_ends() -> None:
    """It finds the locks of another thread as that left them."""
    with parting._lock, parting._nothing_to_do._cond:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            parting.keep("owner", Silent(), lambda: None)  # type: ignore[arg-type]
            parting._end()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
