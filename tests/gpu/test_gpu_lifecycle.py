"""Closing while captured graphs live, and faults of large calls; what holds on the host too is in tests/ranks."""

import gc
import os
import signal
import threading
import time
from typing import Any

import pytest
import torch

from common.cases.diagnosis import check_absent_in_many_ctas
from common.cases.lifecycle import check_closed_until_graphs_are_gone, check_forced_while_a_graph_is_captured
from common.ranks import RankPool, rank_pool
from mnnvl_ar._library import named
from mnnvl_ar.workspace import _give_back_kept


def test_closed_by_force_while_a_graph_is_captured() -> None:
    with RankPool(1, "cuda") as pool:
        pool.run(check_forced_while_a_graph_is_captured)


def ended_by_a_death(rank: Any, verb: str) -> float:
    """Rank 0 closes, or sleeps, while a call that it has queued waits for rank 1, which then dies. The seconds that
    took with a deadline of 60."""
    workspace = rank.new_workspace(max_tokens=1, hidden=64, deadline=60.0)
    row = torch.ones(1, 64, dtype=torch.bfloat16, device=rank.device)
    rank.barrier()
    if rank.rank == 1:
        time.sleep(2.0)
        os.kill(os.getpid(), signal.SIGKILL)
    torch.ops.mnnvl_ar.all_reduce(row, workspace.handle)
    began = time.monotonic()
    getattr(workspace, verb)()
    return time.monotonic() - began


@pytest.mark.parametrize("verb", ["close", "sleep"])
def test_a_death_ends_the_call_that_is_waited_for(verb: str) -> None:
    """Whoever waits for the rank's own calls does not keep out the monitor, which ends them. By two ranks that share a
    GPU."""
    pool = RankPool(2, "cuda:0")
    try:
        (ended, took), _ = pool.start(ended_by_a_death, verb).outcomes(50)
        assert ended, took
        assert took < 10.0
    finally:
        pool.discard()


def closed_by_force_behind(rank: Any, verb: str) -> float:
    """Rank 0 has queued a call, a thread closes, or sleeps, and waits for that call; another closes by force. The
    seconds that takes with a deadline of 60."""
    workspace = rank.new_workspace(max_tokens=1, hidden=64, deadline=60.0)
    row, took = torch.ones(1, 64, dtype=torch.bfloat16, device=rank.device), 0.0
    rank.barrier()
    if rank.rank == 0:
        torch.ops.mnnvl_ar.all_reduce(row, workspace.handle)
        first = threading.Thread(target=getattr(workspace, verb))
        first.start()
        time.sleep(1.0)
        assert first.is_alive()
        began = time.monotonic()
        workspace.close(force=True)
        took = time.monotonic() - began
        first.join()
    rank.barrier()
    workspace.close()
    return took


@pytest.mark.parametrize("verb", ["close", "sleep"])
def test_force_ends_what_another_thread_waits_for(verb: str) -> None:
    with RankPool(2, "cuda:0") as pool:
        assert pool.run(closed_by_force_behind, verb)[0] < 10.0


def fails_after_close(rank: Any) -> tuple[list[str], int, str]:
    """Rank 0 closes while its captured graph lives, and replays it alone."""
    heard: list[Exception] = []
    workspace = rank.new_workspace(max_tokens=1, hidden=64, deadline=1.0, on_fault=heard.append)
    other = rank.new_workspace(max_tokens=1, hidden=64, concurrent=True)
    row, said, sharers = torch.ones(1, 64, dtype=torch.bfloat16, device=rank.device), "", 0
    rank.barrier()
    if rank.rank == 0:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.ops.mnnvl_ar.all_reduce(row, workspace.handle)
        workspace.close()
        sharers = sharers_of(other, row)
        graph.replay()
        torch.cuda.synchronize()
        until = time.monotonic() + 20.0
        while not heard:
            assert time.monotonic() < until, "nobody is told"
            time.sleep(0.01)
        try:
            workspace.check()
        except RuntimeError as error:
            said = str(error)
        del graph
        gc.collect()
        torch.cuda.synchronize()
        while sharers_of(other, row) > 1:
            assert time.monotonic() < until, "it shares the device for good"
            _give_back_kept()
            time.sleep(0.05)
    rank.barrier()
    workspace.close()
    other.close()
    return [type(error).__name__ for error in heard], sharers, said


def sharers_of(workspace: Any, row: torch.Tensor) -> int:
    call = torch.ops.mnnvl_ar._norm_call
    return int(named(call, row, row, row[0].clone(), 1e-6, None, None, workspace.handle, strategy=0)["sharers"])


def test_what_a_replay_finds_after_close_is_told() -> None:
    """And until the graph is gone the closed workspace shares the device: its calls may run beside others."""
    with RankPool(2, "cuda:0") as pool:
        (heard, sharers, said), _ = pool.run(fails_after_close)
    assert heard == ["PeerTimeout"]
    assert sharers == 2
    assert "for rank 1 in" in said


@pytest.mark.gpu(2)
def test_close_until_graphs_are_gone() -> None:
    rank_pool(2, "cuda").run(check_closed_until_graphs_are_gone)


@pytest.mark.gpu(2)
def test_absent_rank_of_large_calls() -> None:
    rank_pool(2, "cuda").run(check_absent_in_many_ctas)
