"""Bring-up over ranks of any launcher: one all-gather, and what becomes of one that does not do as it should."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import mnnvl_ar
from memory import faults, ranks
from memory.simulated_driver import SimulatedDriver
from memory.test_allocate import check_content, check_shared, make
from memory.test_rendezvous import on_host, one
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory import agree, place
from mnnvl_ar.memory.group import Members
from mnnvl_ar.memory.place import GroupStore
from mnnvl_ar.memory.rendezvous import Listener


class Launched:
    """The smallest group there is: mnnvl_ar.Group, over a process group that nothing else of it is used of."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.rank, self.size, self._inner = process_group.rank(), process_group.size(), process_group
        self.threads: list[threading.Thread] = []

    def all_gather(self, text: str) -> Sequence[str]:
        assert text.isascii()
        assert len(text) < 4096
        self.threads.append(threading.current_thread())
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, text, self._inner)
        return told


class Backend:
    """As FlashInfer's CommBackend, and so as mpi4py's Comm, has it."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._launched = Launched(process_group)

    def Get_rank(self) -> int:
        return self._launched.rank

    def Get_size(self) -> int:
        return self._launched.size

    def allgather(self, data: Any) -> list[Any]:
        return [*self._launched.all_gather(data)]


KINDS = {"group": Launched, "communicator": Backend}


def body(rank: int, size: int, store: dist.Store, kind: str) -> int:
    process_group = ranks.group(store, "first", rank, size)
    group: Any = KINDS[kind](process_group)
    memory = make(group)
    assert (memory.rank, memory.world_size) == (rank, size)
    check_content(memory)
    check_shared(memory, process_group)
    before = memory.pointers
    memory.restore(group, 20.0)  # as `wake` and `recover` do
    assert memory.pointers == before
    check_content(memory)
    check_shared(memory, process_group)
    memory.close()
    threads = group.threads if kind == "group" else group._launched.threads
    assert set(threads) <= {threading.main_thread()}
    return len(threads)


@pytest.mark.parametrize(("kind", "size"), [("group", 1), ("group", 3), ("communicator", 3)])
def test_one_all_gather_a_bring_up(kind: str, size: int) -> None:
    assert one(ranks.values(ranks.launch(size, body, kind))) == (2 if size > 1 else 0)


def leaks_body(rank: int, size: int, store: dist.Store) -> None:
    group: Any = Launched(ranks.group(store, "first", rank, size))
    make(group).close()
    before = ranks.census()
    for _ in range(5):
        make(group).close()
    faults.check_census(before, "five more")


def test_rounds_leave_nothing() -> None:
    ranks.values(ranks.launch(2, leaks_body))


def workspace_body(rank: int, size: int, store: dist.Store) -> None:
    group = Launched(ranks.group(store, "first", rank, size))
    assert isinstance(group, mnnvl_ar.Group)
    with mnnvl_ar.Workspace(group, 4, 64, torch.float32, device="cpu", deadline=20.0) as workspace:
        x = torch.full((4, 64), float(rank + 1))
        for _ in range(2):
            total = mnnvl_ar.ops.all_reduce(x, workspace.handle)
            assert torch.equal(total, torch.full_like(x, size * (size + 1) / 2))
            workspace.recover(group)


def test_a_workspace_over_it() -> None:
    ranks.values(ranks.launch(2, workspace_body))


def hosts_body(rank: int, size: int, store: dist.Store) -> Any:
    process_group = ranks.group(store, "first", rank, size)
    opened = []
    with on_host(f"host{rank // 2}"), mock.patch.object(Listener, "_open_tcp", counted(Listener._open_tcp, opened)):
        memory = make(
            Launched(process_group), device=torch.device("cuda", 0), transport="unicast", driver=SimulatedDriver(rank)
        )
    check_shared(memory, process_group)
    memory.close()
    return memory.reason, len(opened)


def counted(call: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def counting(*arguments: Any) -> Any:
        calls.append(arguments)
        return call(*arguments)

    return counting


def test_across_hosts() -> None:
    told = ranks.values(ranks.launch(4, hosts_body))
    assert all(reason.startswith("unicast over fabric, 4 ranks on 2 hosts") for reason, _ in told)
    assert [opened for _, opened in told] == [1, 0, 0, 0]


def test_ranks_of_one_host_open_no_port() -> None:
    assert one(ranks.values(ranks.launch(2, hosts_body)))[1] == 0


def failing_body(rank: int, size: int, store: dist.Store) -> Any:
    group = Launched(ranks.group(store, "first", rank, size))
    told = [faults.attempt(group, "host", 20.0, {"allocate": "failure"} if rank == 1 else {})[0]]
    with mock.patch.object(Listener, "_bind_tcp", side_effect=OSError(24, "Too many open files")):
        for _ in range(2):
            with pytest.raises(BringUpError) as caught:
                make(group)
            told.append((caught.value.rank, caught.value.step, caught.value.cause))
    make(group).close()  # nobody is out of step
    return told


def test_a_rank_that_fails_is_named_on_all() -> None:
    told = ranks.values(ranks.launch(3, failing_body))
    assert told[0] == told[1] == told[2]
    assert told[0][0][:2] == (1, "allocate")
    assert told[0][1] == told[0][2] == (0, "rendezvous", "cannot listen: [Errno 24] Too many open files")


def dead_body(rank: int, size: int, store: dist.Store) -> Any:
    group = Launched(ranks.group(store, "first", rank, size))
    return faults.attempt(group, "host", 20.0, {"import": "kill"} if rank == 1 else {})


def test_after_the_gather_a_death_is_noticed_by_us() -> None:
    ends = ranks.launch(3, dead_body)
    told = [ends[rank].value for rank in (0, 2)]
    assert one([answer for answer, _ in told])[:2] == (1, "import")
    assert max(seconds for _, seconds in told) < 10, "noticed, not waited for"


class Wrong(Launched):
    """A group whose all-gather does something else to what it has gathered."""

    def __init__(self, process_group: dist.ProcessGroup, then: Callable[[list[str]], Any]) -> None:
        super().__init__(process_group)
        self._then = then

    def all_gather(self, text: str) -> Any:
        return self._then([*super().all_gather(text)])


def fails(told: list[str]) -> list[str]:
    raise ConnectionError("the launcher is gone")


WRONG: dict[str, tuple[Callable[[list[str]], Any], str]] = {
    "order": (lambda told: told[::-1], "wanted every rank, in order"),
    "one short": (lambda told: told[:-1], "wanted every rank, in order"),
    "none": (lambda told: None, "all-gather failed: TypeError"),
    "other text": (lambda told: ["hello"] * 3, "all-gather failed: JSONDecodeError"),
    "no text": (lambda told: [1, 2, 3], "all-gather failed: TypeError"),
    "an error": (fails, "all-gather failed: ConnectionError: the launcher is gone"),
}


def wrong_body(rank: int, size: int, store: dist.Store) -> list[str]:
    process_group = ranks.group(store, "first", rank, size)
    told = []
    for then, words in WRONG.values():
        with pytest.raises(BringUpError, match=words) as caught:
            make(Wrong(process_group, then))
        assert (caught.value.rank, caught.value.step) == (-1, "rendezvous")
        told.append(str(caught.value))
    make(Wrong(process_group, lambda told: told)).close()
    return told


def test_an_all_gather_that_does_something_else() -> None:
    told = ranks.values(ranks.launch(3, wrong_body))
    assert told[0] == told[1] == told[2]


class Odd:
    def __init__(self, rank: Any, size: Any) -> None:
        self.rank, self.size = rank, size

    def all_gather(self, text: str) -> list[str]:
        raise AssertionError("nobody is to be waited for")


@pytest.mark.parametrize("group", [None, 3, object(), dist.GroupMember.NON_GROUP_MEMBER, {"rank": 0, "size": 1}])
def test_what_is_no_group(group: Any) -> None:
    with pytest.raises(
        ValueError, match=r"group: is .*, wanted a process group that this process is a member of, a mn"
    ):
        Members(group)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0), ("0", 1), (0, None)])
def test_ranks_that_there_cannot_be(rank: Any, size: Any) -> None:
    with pytest.raises(ValueError, match=r"group: has rank .*, wanted one from 0 to size - 1"):
        mnnvl_ar.Workspace(Odd(rank, size), 4, 64, torch.float32, device="cpu")


def agree_body(rank: int, size: int, store: dist.Store) -> list[str]:
    process_group = ranks.group(store, "first", rank, size)
    told = []
    for group in (process_group, Launched(process_group)):
        assert agree(group, {"rank": rank}, step="test") == [{"rank": other} for other in range(size)]
        with pytest.raises(BringUpError) as caught:
            agree(group, step="test", trouble=ValueError("odd") if rank == 1 else None)
        assert (caught.value.rank, caught.value.step) == (1, "test")
        told.append(str(caught.value))
    if rank != 2:
        with pytest.raises(BringUpError, match="no answer from rank 2") as caught:
            agree(process_group, step="test", timeout=1.0)
        told.append(str(caught.value))
    ranks.meet(store, "end", size)  # rank 0 may host what the others need
    return told


def test_a_vote_on_its_own() -> None:
    told = ranks.values(ranks.launch(3, agree_body))
    assert told[0] == told[1]
    assert told[2] == told[0][:2]
    assert "ValueError: odd" in told[0][0]


class _SlowStore:
    """Of a group that is its own store: it is empty, and takes a moment to say so."""

    def get_group_store(self) -> _SlowStore:
        return self

    def check(self, keys: list[str]) -> bool:
        time.sleep(0.1)
        return False


class _Place(GroupStore):
    def __init__(self, seconds_left: float) -> None:
        self._group: Any = _SlowStore()
        self.deadline = time.monotonic() + seconds_left


def test_a_look_that_begins_at_the_deadline_is_not_a_store_that_is_gone() -> None:
    """Else a rank that waits for one that never comes would blame the store."""
    assert _Place(0.0).find() is None
    with mock.patch.object(place, "_AT_LEAST", 0.0), pytest.raises(BringUpError, match="store does not answer"):
        _Place(0.0).find()
