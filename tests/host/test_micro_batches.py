"""Two micro-batches that share a workspace, whose calls ranks make in another order: mixed in silence, or told by
tags."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from common.cases import gone
from common.ranks import RankPool, rank_pool

SHAPE = (4, 64)
STEP = 100.0  # rows of micro-batch b are STEP**b times those of micro-batch 0, so that a sum shows what is in it


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """So many ranks of our own, to be left behind with a fault."""
    pool = RankPool(request.param)
    yield pool
    pool.discard()


def share(rank: int, batch: int) -> float:
    """What a rank adds to the sum of a micro-batch."""
    return STEP**batch * (rank + 1)


@dataclass
class Told:
    """values: of each call's rows, in the order of the calls, if they are of one value (NaN is one, else None); 0 where
    nothing was written. said: what the ops said. fault: what `check` says when all have made their calls."""

    values: list[float | None]
    said: list[str]
    fault: gone.Told | None


def both(rank: Any, order: list[int], tags: list[int], threads: bool) -> Told:
    """All-reduces two micro-batches in `order`; with `threads` each from a thread of its own, one at a time, as behind
    a lock."""
    from mnnvl_ar import ops

    workspace = rank.new_workspace(max_tokens=SHAPE[0], hidden=SHAPE[1], deadline=60.0)
    outs, said, turns = [torch.zeros(SHAPE) for _ in order], [""] * len(order), [threading.Event() for _ in order]

    def call(place: int) -> None:
        assert turns[place].wait(gone.PATIENCE)
        x = torch.full(SHAPE, share(rank.rank, order[place]))
        try:
            ops.all_reduce_out(x, outs[place], workspace.handle, tag=tags[order[place]])
        except RuntimeError as error:
            said[place] = str(error)
        for turn in turns[place + 1 : place + 2]:
            turn.set()

    rank.barrier()
    turns[0].set()
    if threads:
        working = [threading.Thread(target=call, args=(place,)) for place in reversed(range(len(order)))]
        for thread in working:
            thread.start()
        for thread in working:
            thread.join()
    else:
        for place in range(len(order)):
            call(place)
    rank.barrier()
    fault = gone.told(workspace)
    rank.barrier()
    workspace.close()
    return Told([value_of(out) for out in outs], said, fault)


def value_of(out: torch.Tensor) -> float | None:
    same = out.isnan().all() or (out == out[0, 0]).all()
    return float(out[0, 0]) if same else None


def in_order(rank: Any, swaps: int, *arguments: Any) -> Any:
    """Rank `swaps` has the second micro-batch first."""
    return both(rank, [1, 0] if rank.rank == swaps else [0, 1], *arguments)


SIZES = pytest.mark.parametrize(("pool", "swaps"), [(2, 1), (3, 0)], indirect=["pool"])
WAYS = pytest.mark.parametrize("threads", [False, True], ids=["one thread", "two threads"])


@WAYS
@SIZES
def test_another_order_is_told_by_tags(pool: RankPool, swaps: int, threads: bool) -> None:
    """On all ranks, in the first call of the two; neither has a sum."""
    for rank, told in enumerate(pool.run(in_order, swaps, [0, 1], threads)):
        assert all(value is not None and (math.isnan(value) or value == 0.0) for value in told.values), told
        assert all(told.said), told
        assert told.fault is not None
        kind, peer, text, _ = told.fault
        assert kind == "CallMismatch", text
        assert "with tag 1 instead of 0" in text or "with tag 0 instead of 1" in text
        assert f"rank {swaps}" in text
        assert peer == swaps or rank == swaps or pool.world_size == 2, text  # of two, either may be


@WAYS
@SIZES
def test_control_without_tags_sums_are_mixed_in_silence(pool: RankPool, swaps: int, threads: bool) -> None:
    """What tags are for: each rank gets the one's rows with the other's, and no error, neither then nor later."""
    ranks = range(pool.world_size)
    mixed = [sum(share(rank, place ^ (rank == swaps)) for rank in ranks) for place in (0, 1)]
    assert not set(mixed) & {sum(share(rank, batch) for rank in ranks) for batch in (0, 1)}, "those would be right"
    for told in pool.run(in_order, swaps, [0, 0], threads):
        assert told == Told(mixed, ["", ""], None)


@WAYS
def test_tags_are_no_fault_in_one_order(threads: bool) -> None:
    right = [share(0, batch) + share(1, batch) for batch in (0, 1)]
    for order in ([0, 1], [1, 0]):
        for told in rank_pool(2).run(both, order, [0, 1], threads):
            assert told == Told([right[batch] for batch in order], ["", ""], None)
