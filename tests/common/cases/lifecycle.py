"""Workspaces that sleep, recover and are closed, with captured graphs where there is a GPU."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from common.cases.bad_input import expect
from common.cases.calls import Call, Prepared, check_calls
from common.cases.gone import graphs_live

SMALL = {"max_tokens": 8, "hidden": 64, "dtype": torch.bfloat16}
CALLS = [Call(tokens=t, strategy=n % 2, out="E", seed=n) for n, t in enumerate((1, 8, 3))]


def check_replays(rank: Any, replays: list[tuple[Prepared, Any]]) -> None:
    """All graphs, twice over, every bit."""
    for prepared, graph in replays * 2:
        rank.barrier()
        graph.replay()
        rank.synchronize()
        assert prepared.wrong() == []


def captured(rank: Any, workspace: Any) -> list[tuple[Prepared, Any]]:
    """A graph of each call; none on the host."""
    if rank.device.type != "cuda":
        return []
    made = []
    for call in CALLS:
        prepared = Prepared(rank, call)
        made.append((prepared, rank.capture(lambda p=prepared: p.launch(workspace.handle))))
    return made


def check_sleep(rank: Any, rounds: int = 3) -> None:
    """Asleep, ops raise and physical memory is gone; awake, addresses are the same and calls and graphs are right."""
    from mnnvl_ar import ops

    workspace = rank.new_workspace(max_tokens=512, hidden=8192)
    graphs = captured(rank, workspace)
    pointers = workspace._memory.pointers
    for _ in range(rounds):
        check_calls(rank, CALLS, handle=workspace.handle)
        check_replays(rank, graphs)
        rank.barrier()
        awake = used(rank)
        workspace.checkpoint_prepare()
        workspace.sleep()
        rank.barrier()
        instead = 4 << 20 if graphs else 0  # what stands in for it, where graphs may come
        assert used(rank) <= awake - workspace.nbytes + instead, "memory is given back"
        x = torch.ones(1, 64, device=rank.device)
        expect(lambda x=x: ops.all_reduce(x, workspace.handle), "is asleep", "asleep")
        expect(workspace.check, "is asleep", "asleep")
        expect(lambda: setattr(workspace, "deadline", 5.0), "deadline: this workspace is asleep", "asleep")
        assert workspace.is_asleep
        workspace.checkpoint_restore(rank.group)
        assert workspace._memory.pointers == pointers
    check_calls(rank, CALLS, handle=workspace.handle)
    rank.barrier()
    workspace.close(force=True)


def used(rank: Any) -> int:
    """Bytes of this GPU in use, or of shared memory that this process has touched."""
    if rank.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(rank.device)
        return int(total - free)
    maps = Path("/proc/self/smaps").read_text().split("memfd:")[1:]
    return sum(1024 * int(part.split("Rss:")[1].split()[0]) for part in maps)


def check_recover(rank: Any, rounds: int = 2) -> None:
    """Rank 1 stays away; all are told of it, recover, and calls and graphs are right again."""
    workspace = rank.new_workspace(**SMALL, deadline=0.5)
    graphs = captured(rank, workspace)
    for _ in range(rounds):
        check_calls(rank, CALLS, handle=workspace.handle)
        check_replays(rank, graphs)
        rank.barrier()
        if rank.rank != 1:
            make_fail(rank, workspace)
        error = broken(workspace, 10.0)  # a rank that calls nothing is told too
        assert type(error).__name__ == "PeerTimeout", error
        assert error.peer == 1, str(error)
        expect(lambda: one_call(rank, workspace), "for rank 1", "broken")
        for prepared, graph in graphs:  # ends at once, with NaN
            graph.replay()
            rank.synchronize()
            assert all(bool(output.isnan().all()) for output in prepared.outputs)
        rank.barrier()
        workspace.recover(rank.group)
        workspace.check()
    check_calls(rank, CALLS, handle=workspace.handle)
    check_replays(rank, graphs)
    rank.barrier()
    workspace.close(force=True)


def broken(workspace: Any, within: float) -> Any:
    """What check() raises within so many seconds; None if nothing."""
    import mnnvl_ar

    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            workspace.check()
        except mnnvl_ar.WorkspaceBroken as error:
            return error
        time.sleep(0.01)
    return None


def one_call(rank: Any, workspace: Any) -> torch.Tensor:
    from mnnvl_ar import ops

    return ops.all_reduce(torch.ones(2, 64, device=rank.device), workspace.handle)


def make_fail(rank: Any, workspace: Any) -> str:
    """A call that its peers do not come to, or come to otherwise. What the op said."""
    if rank.device.type == "cpu":
        with pytest.raises(RuntimeError) as caught:
            one_call(rank, workspace)
        return str(caught.value)
    out = one_call(rank, workspace)
    rank.synchronize()
    assert bool(out.isnan().all()), "outputs are NaN"
    assert float(torch.ones(4, device=rank.device).sum()) == 4, "the context is alive"
    return ""


def check_closed_with_graphs(rank: Any) -> None:
    """What graphs may use stays mapped after `close`; `force` gives it back."""
    from mnnvl_ar import ops

    workspace = rank.new_workspace(**SMALL)
    graphs = captured(rank, workspace)
    rank.barrier()
    workspace.close()
    x = torch.ones(1, 64, device=rank.device)
    expect(lambda: ops.all_reduce(x, workspace.handle), "is closed", "closed")
    check_replays(rank, graphs)
    rank.barrier()


def check_forced_while_a_graph_is_captured(rank: Any) -> None:
    """Nobody can wait for the calls then: the memory stays, and goes when that is over. The driver may end the capture
    for it."""
    workspace = rank.new_workspace(max_tokens=512, hidden=8192)
    one_call(rank, workspace)
    rank.synchronize()
    refused = []
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured; close it again"):
            workspace.close(force=True)
        refused.append(workspace._memory is not None)
    assert refused == [True]
    make_fail(rank, workspace)
    assert "ended its call itself" in str(broken(workspace, 1.0))
    expect(lambda: one_call(rank, workspace), "ended its call itself", "its calls are ended")
    before = used(rank)
    workspace.close(force=True)
    assert used(rank) < before, "the memory is given back"


def check_closed_until_graphs_are_gone(rank: Any) -> None:
    """What graphs may use is given back once they are destroyed, when a workspace is made or closed."""
    from mnnvl_ar.workspace import _give_back_kept

    workspace = rank.new_workspace(max_tokens=512, hidden=8192)
    graphs = captured(rank, workspace)
    rank.barrier()
    workspace.close()
    check_replays(rank, graphs)
    rank.barrier()
    before = used(rank)
    graphs.clear()
    gc.collect()
    torch.cuda.synchronize()
    until = time.monotonic() + 5.0
    while used(rank) > before - workspace.nbytes:
        assert time.monotonic() < until, "the memory was not given back"
        _give_back_kept()
        time.sleep(0.05)
    rank.barrier()


def check_kept_is_given_back(rank: Any) -> None:
    """What could not be unmapped at close is unmapped when the next workspace is made."""
    from mnnvl_ar import ops

    workspace = rank.new_workspace(max_tokens=512, hidden=4096)
    ops.all_reduce(torch.ones(512, 4096), workspace.handle)
    rank.barrier()
    with graphs_live():
        workspace.close()
    before = used(rank)
    assert before >= workspace.nbytes // 2
    rank.new_workspace(**SMALL).close()
    assert used(rank) < before // 2


def check_rounds(rank: Any, rounds: int = 200) -> None:
    """Made and closed, over and over: nothing is left of it."""
    for number in range(rounds + 5):
        if number == 5:
            rank.barrier()
            before = used(rank), len(os.listdir("/proc/self/fd"))
        rank.new_workspace(max_tokens=512, hidden=4096).close()
    rank.barrier()
    memory, fds = used(rank) - before[0], len(os.listdir("/proc/self/fd")) - before[1]
    # Fault records, of a page at most, are kept for good: graphs may still write them.
    assert memory < (8 << 20) + rounds * 4096, f"{memory} bytes are left"
    assert fds <= 1, f"{fds} file descriptors are left"
