"""Whatever a signal's handler raises, and wherever: what is left can be closed, and peers hear of it. Memory and
connections are those of ranks of our own, which count what they hold."""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch

import mnnvl_ar
from common.cases import gone
from common.interrupts import Interrupt, interrupted
from common.ranks import RankPool
from mnnvl_ar.memory import lifeline
from mnnvl_ar.memory.group import Members
from mnnvl_ar.memory.place import GroupStore
from mnnvl_ar.memory.rendezvous import _Guest

SMALL = {"max_tokens": 1, "hidden": 64, "dtype": torch.bfloat16, "deadline": 60.0}
SOON = 10.0  # seconds, for what takes a tenth of one; the deadline is 60 s
ROOM = str(Path(mnnvl_ar.__file__).parent)


def held() -> dict[str, int]:
    """What this process holds of workspaces."""
    gc.collect()
    return {
        "mapped": Path("/proc/self/maps").read_text().count("memfd:mnnvl_ar"),
        "sockets": gone.sockets(),
        "lifelines": len(lifeline._open),
    }


def is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(ROOM)


def closed_in_pieces(rank: Any, verb: str, at: int) -> tuple[bool, dict[str, int], dict[str, int]]:
    """Rank 1's `verb` is interrupted, and then the workspace is closed. Whether there was such a place; what each rank
    held before, and holds then."""
    before, there = held(), False
    workspace = rank.new_workspace(**SMALL)
    if rank.rank == 1:
        there = interrupted(getattr(workspace, verb), at, is_ours)
    workspace.close()
    rank.barrier()
    return there, before, held()


@pytest.mark.parametrize("verb", ["close", "sleep"])
def test_what_was_cut_short_is_closed_by_the_next_close(verb: str) -> None:
    """At every fifth place. A descriptor of memory may be lost, between the call that closes it and its mark."""
    with RankPool(2) as pool:
        pool.run(closed_in_pieces, verb, 10**6)  # once without, for what is made at the first time
        at = 1
        while True:
            results = pool.run(closed_in_pieces, verb, at)
            for _, before, after in results:
                assert after == before, at
            if not results[1][0]:
                break
            at += 5
    assert at > 50


def told_late(rank: Any) -> tuple[str, int, float]:
    """Rank 1 closes, is interrupted while it tells its peers, and closes again. What rank 0 hears in its next call."""
    workspace, tell, times = rank.new_workspace(**SMALL), lifeline.Lifeline._tell, list[int]()

    def once(line: Any, what: Any) -> None:
        if not times:
            times.append(1)
            raise Interrupt
        tell(line, what)

    kind, peer, began = "", -1, time.monotonic()
    if rank.rank == 1:
        with mock.patch.object(lifeline.Lifeline, "_tell", once):
            with pytest.raises(Interrupt):
                workspace.close()
            workspace.close()
    else:
        kind, peer, _, _ = gone.call_in_vain(rank, workspace)
        workspace.close()
    return kind, peer, time.monotonic() - began


def test_peers_hear_of_a_close_that_was_cut_short() -> None:
    with RankPool(2) as pool:
        (kind, peer, took), _ = pool.run(told_late)
    assert (kind, peer) == ("PeerGone", 1)
    assert took < SOON


class Raises(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise Interrupt


def made_in_vain(rank: Any) -> tuple[str, int, dict[str, int], dict[str, int]]:
    """On rank 0 a handler raises when all ranks have the workspace already. What rank 1 hears in its first call."""
    log, before, kind, peer = logging.getLogger("mnnvl_ar"), held(), "", -1
    if rank.rank == 0:
        handler = Raises()
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        with pytest.raises(Interrupt):
            rank.new_workspace(**SMALL)
        log.removeHandler(handler)
    else:
        workspace = rank.new_workspace(**SMALL)
        kind, peer, _, _ = gone.call_in_vain(rank, workspace)
        workspace.close()
    return kind, peer, before, held()


def test_a_rank_that_fails_after_the_last_vote_is_told_of() -> None:
    with RankPool(2) as pool:
        for rank, (kind, peer, before, after) in enumerate(pool.run(made_in_vain)):
            assert after == before
            assert rank == 0 or (kind, peer) == ("PeerGone", 0)


def recovered_in_pieces(rank: Any) -> str:
    """Rank 1 is interrupted behind the unmapping of its own block, and then asked how many calls it has made."""
    workspace, said = rank.new_workspace(**SMALL), ""
    if rank.rank == 1:
        driver, own = workspace._memory._block.driver, workspace._memory.pointers[1]
        calls = workspace._memory._block.views._calls

        def unmap(address: int, nbytes: int) -> None:
            driver.unmap(address, nbytes)
            if address == own:
                raise Interrupt

        calls[:] = [(unmap if call == driver.unmap else call, arguments) for call, arguments in calls]
        with pytest.raises(Interrupt):
            workspace.recover(rank.group, 2.0)
        with pytest.raises(mnnvl_ar.MnnvlArError) as caught:
            _ = workspace.calls
        said = str(caught.value)
    else:
        with pytest.raises(mnnvl_ar.BringUpError):
            workspace.recover(rank.group, 2.0)
    rank.barrier()
    workspace.recover(rank.group)
    assert float(mnnvl_ar.ops.all_reduce(torch.ones(1, 64, dtype=torch.bfloat16), workspace.handle)[0, 0]) == 2.0
    workspace.close()
    return said


def test_nobody_looks_at_memory_that_is_half_gone() -> None:
    with RankPool(2) as pool:
        assert "is asleep, or on its way" in pool.run(recovered_in_pieces)[1]


def meets_in_vain(rank: Any) -> str:
    """The last rank introduces itself as the last one, and dies before all are welcomed."""
    group = rank.join()
    if rank.rank != rank.world_size - 1:
        with pytest.raises(mnnvl_ar.BringUpError) as caught:
            rank.new_workspace(**SMALL, group=group, timeout=5.0)
        return f"{caught.value.rank}: {caught.value.cause}"
    members = Members(group)
    place = GroupStore(members, 5.0)
    place.come()
    time.sleep(0.2)
    members.meets("?")
    _, connection = _Guest(place, members, members.who(), 5.0)._look_for_rank_0()
    connection.close()
    place.leave()
    return ""


def test_who_dies_as_the_last_to_come_is_named_alike() -> None:
    with RankPool(5) as pool:
        for _ in range(5):
            first, *others, _ = pool.run(meets_in_vain)
            assert first.startswith("4: its process died")
            assert others == [first] * 3
