"""Ranks find out whether they are of one group before they share anything."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from memory import ranks
from memory.test_allocate import check_content, make
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory import agree, process
from mnnvl_ar.memory.group import Members
from mnnvl_ar.memory.place import GroupShared, GroupStore


def failure(group: Any, timeout: float = 20.0) -> str:
    try:
        memory = make(group, timeout=timeout)
    except (BringUpError, ValueError) as error:
        return str(error)
    check_content(memory)
    memory.close()
    return ""


def named_body(rank: int, size: int, store: dist.Store, other: dict[str, Any]) -> tuple[str, str]:
    """Ranks 0 and 1 over a raw store; rank 1's group is another one, as `other` says."""
    group = dist.ProcessGroup(store, rank, size)
    before = failure(group)
    plain = Members.who
    with mock.patch.object(Members, "who", lambda self: plain(self) | (other if rank == 1 else {})):
        return before, failure(group)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"name": "tp:0"}, "name is 'tp:0' there, and '' on rank 0"),
        ({"members": [4, 5]}, "members is [4, 5] there, and [] on rank 0"),
        ({"met": "another"}, "what they were named when they met before is 'another' there"),
        ({"met": ""}, "what they were named when they met before is '' there"),
    ],
)
def test_a_rank_of_another_group_is_refused(other: dict[str, Any], words: str) -> None:
    for before, told in ranks.values(ranks.launch(2, named_body, other)):
        assert before == ""
        assert "rank 1 at step 'rendezvous': it is of another group" in told
        assert words in told
        assert "PrefixStore" in told


def fresh_body(rank: int, size: int, store: dist.Store) -> tuple[str, str]:
    """Rank 1 comes with a group that has never met, over the store of one that has."""
    group = dist.ProcessGroup(store, rank, size)
    before = failure(group)
    return before, failure(dist.ProcessGroup(store, rank, size) if rank == 1 else group)


def test_a_group_that_never_met_is_not_the_one_that_did() -> None:
    for before, told in ranks.values(ranks.launch(2, fresh_body)):
        assert before == ""
        assert "what they were named when they met before is '' there" in told


def test_control_a_rank_that_forgot_is_not() -> None:
    """As one whose last bring-up was interrupted."""
    assert ranks.values(ranks.launch(2, named_body, {"met": "?"})) == [("", "")] * 2


def shared_store_body(rank: int, size: int, store: dist.Store, first: list[int], watched: bool) -> Any:
    """Processes 0 and 1 are a group, and 2 and 3 another one, over one raw store. Those of `first` come before the
    others, which are refused while the former still bring up. Returns what this one was told, or, if it was told
    nothing, the sum over the group that it got of 10 to the power of each process."""
    group = dist.ProcessGroup(dist.PrefixStore("raw", store), rank % 2, 2)

    def use(pointers: tuple[int, ...], _: int) -> Any:
        ranks.meet(store, "all have come", size)
        ctypes.memmove(pointers[rank % 2], struct.pack("d", 10.0**rank), 8)
        return lambda: None

    if rank not in first:
        ranks.meet(store, "the first are in", size)
    come = GroupStore.come

    def come_first(place: GroupStore) -> None:
        come(place)
        ranks.meet(store, "the first are in", size)

    with contextlib.ExitStack() as stack:
        if rank in first:
            stack.enter_context(mock.patch.object(GroupStore, "come", come_first))
        if not watched:
            stack.enter_context(mock.patch.object(GroupStore, "contested", return_value=""))
            stack.enter_context(mock.patch.object(GroupStore, "tell"))
        try:
            memory = make(group, timeout=20.0, use=use, alike={"group": ""})
        except BringUpError as error:
            # Who has the place may have been told before it came to `use`: then nobody waits for anybody.
            store.add("all have come", 1)
            return str(error)
    store.set(f"written {rank}", "")
    store.wait([f"written {other}" for other in first])
    found = sum(struct.unpack("d", ctypes.string_at(pointer, 8))[0] for pointer in memory.pointers)
    memory.close()
    return found


@pytest.mark.parametrize("first", [[0, 3], [2, 1], [0, 1]], ids=str)
def test_two_groups_over_one_store_get_no_memory(first: list[int]) -> None:
    """Whichever two come first, of one group or of two: nobody can tell, so neither pair goes on."""
    told = ranks.values(ranks.launch(4, shared_store_body, first, True))
    for rank, text in enumerate(told):
        refused = f"rank {rank % 2} of this group is already process" in str(text)
        contested = "of this group, too" in str(text) or "is already process" in str(text)
        assert contested if rank in first else refused, told
        assert "PrefixStore" in text, told


def test_control_unwatched_they_get_each_others_sums() -> None:
    told = ranks.values(ranks.launch(4, shared_store_body, [0, 3], False))
    assert told[0] == told[3] == 1001.0, told


def twice_body(rank: int, size: int, store: dist.Store) -> None:
    """A second thread is refused while a first one brings up, over the group and over another one of its store."""
    raw = dist.PrefixStore("raw", store)
    group, other = dist.ProcessGroup(raw, rank, size), dist.ProcessGroup(raw, rank, size)
    inside, leave = threading.Event(), threading.Event()

    def use(*_: Any) -> Any:
        inside.set()
        leave.wait(60)
        return lambda: None

    first = threading.Thread(target=lambda: make(group, use=use, timeout=60.0).close())
    first.start()
    assert inside.wait(60)
    for each in (group, other):
        with pytest.raises(ValueError, match="another thread of this process is in a bring-up over it"):
            make(each)
        with pytest.raises(ValueError, match="another thread of this process"):
            agree(each, step="test")
    leave.set()
    first.join()
    assert failure(group) == ""
    assert failure(other) == ""


def test_two_threads_over_one_group_are_refused() -> None:
    ranks.values(ranks.launch(2, twice_body))


def of_one_store(path: Path, rank: int) -> dist.ProcessGroup:
    """By a store object of its own, as another library of this process would have it."""
    return dist.ProcessGroup(dist.FileStore(str(path), 4), rank, 2)


@pytest.mark.parametrize("watched", [True, False], ids=["", "control"])
def test_another_bring_up_of_this_process_has_the_place(tmp_path: Path, watched: bool) -> None:
    """While it looks for its peers, and when it has met them; not when it has ended."""
    first, second = (Members(of_one_store(tmp_path / "store", 0)) for _ in range(2))
    blind = contextlib.nullcontext() if watched else mock.patch.object(Members, "is_of_another", return_value=False)
    refused = pytest.raises(GroupShared, match=r"rank 0 of this group is already process \d+, this one, for another")
    with second.alone(), blind:
        with first.alone():
            place = GroupStore(first, 5.0)
            place.come()
            for _ in range(2):
                with refused if watched else contextlib.nullcontext():
                    GroupStore(second, 5.0).come()
                assert ("this one, for another group wanted to be rank 0" in place.contested()) == watched
                place.leave()
        place = GroupStore(second, 5.0)
        place.come()
        assert place.contested() == ""
    with first.alone():
        GroupStore(first, 5.0).come()


def crossed_body(rank: int, size: int, store: dist.Store, path: str) -> list[str]:
    """Two threads a rank, of a group each, over one file; on rank 1 the other one comes first."""
    told = ["", ""]

    def one(number: int) -> None:
        told[number] = failure(of_one_store(Path(path), rank), timeout=6.0)

    threads = [threading.Thread(target=one, args=(number,)) for number in ((0, 1) if rank == 0 else (1, 0))]
    if rank == 1:
        store.wait(["both are there"])
    for thread in threads:
        thread.start()
        time.sleep(0.5)
    if rank == 0:
        store.set("both are there", "")
    for thread in threads:
        thread.join()
    return told


def test_two_groups_of_the_same_processes_over_one_store(tmp_path: Path) -> None:
    told = ranks.values(ranks.launch(2, crossed_body, str(tmp_path / "store")))
    assert any("this one, for another group" in text for text in told[0]), told
    assert all(text for texts in told for text in texts), told


def gone_body(rank: int, size: int, store: dist.Store) -> Any:
    """A process that ended leaves its place to another one."""
    group = dist.ProcessGroup(store, rank, size)
    assert failure(group) == ""
    ranks.meet(store, "made", size)
    if rank == 1:
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told = failure(dist.ProcessGroup(store, 1, 2), timeout=5.0)
        os._exit(0 if "rank 1 of this group is already process" in told else 1)
    return 0


def test_a_forked_child_does_not_take_its_parents_place() -> None:
    assert ranks.values(ranks.launch(2, gone_body)) == [0, 0]


def test_who_is_another_process() -> None:
    mine = process.this()
    parent = {**mine, "pid": str(os.getppid()), "since": process._since(os.getppid())}
    assert not process.is_another(mine)
    assert process.is_another(parent)
    assert not process.is_another({**parent, "since": "1"})  # its number has been given to another one since
    assert not process.is_another({**parent, "where": "elsewhere/1"})
    assert not process.is_another({})
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert process._since(child) == "", "it has ended, and waits to be noticed"
    os.waitpid(child, 0)
