"""Captured calls that run while their workspace sleeps, recovers, or has been closed by force: NaN, with a name."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from common.cases.calls import Call, check_calls
from common.cases.gone import Log
from common.cases.lifecycle import CALLS, SMALL, captured, check_replays, used
from common.cases.rules import break_rule
from mnnvl_ar import monitor as watchers

PATIENCE = 20.0
LATE = 1.0  # seconds that a call on the host pauses between its two looks at the workspace
SAYS = "ran, as part of a CUDA graph, while its workspace was asleep or after close(force=True)"
WAYS = ("sleep", "checkpoint_prepare", "close")


def until(is_so: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def leave(workspace: Any, how: str) -> None:
    workspace.close(force=True) if how == "close" else getattr(workspace, how)()


def check_named(workspace: Any, how: str, log: list[str], told: list[Exception]) -> None:
    """By `check()`, by the log, and by `on_fault`; the monitor does not watch a process that is about to be frozen."""
    import mnnvl_ar

    with pytest.raises(mnnvl_ar.WorkspaceBroken) as caught:
        workspace.check()
    error = caught.value
    assert type(error) is mnnvl_ar.WorkspaceBroken, error
    assert f"rank {workspace.rank}: all_reduce" in str(error), error
    assert SAYS in str(error), error
    assert (error.rank, error.peer, error.call_number) == (workspace.rank, workspace.rank, -1), vars(error)
    if how != "checkpoint_prepare":
        until(lambda: told, "on_fault was not called")
        assert str(told[0]) == str(error)
        until(lambda: log, "the monitor says nothing")
        assert f"workspace {workspace.handle} is broken: rank {workspace.rank}: all_reduce" in log[0]
    time.sleep(0.3)
    assert len(log) == len(told) == (how != "checkpoint_prepare"), log


# ---- on the host: a test build, where a call that has begun does not look again whether the workspace sleeps


def check_late_call(rank: Any, how: str, stands_in: bool, is_broken: bool = False) -> None:
    """A call comes to the addresses of a workspace whose memory has gone meanwhile, as a captured one would. Without
    what stands in, the process ends there. is_broken: behind another fault, which was told meanwhile."""
    import mnnvl_ar.workspace as module
    from mnnvl_ar import MnnvlArError, ops

    told: list[Exception] = []
    workspace = rank.new_workspace(**SMALL, deadline=60.0, on_fault=told.append)
    check_calls(rank, [Call(tokens=2)], handle=workspace.handle)
    rank.barrier()
    x, out, said = torch.ones(2, 64), torch.zeros(2, 64), list[str]()
    pause = 12 * LATE if is_broken else LATE

    def call() -> None:
        try:
            ops.all_reduce_out(x, out, workspace.handle)
        except RuntimeError as error:
            said.append(str(error))

    graphs = mock.Mock(wraps=module.ops, _workspace_graphs=lambda handle: int(stands_in))
    with Log() as log:
        break_rule(workspace.handle, "still_open", delay_ns=int(pause * 1e9))
        thread = threading.Thread(target=call)
        thread.start()
        time.sleep(LATE / 4)
        if is_broken:
            break_rule(workspace.handle, "")
            fail_and_be_told(rank, workspace, told)
            log.clear()
            break_rule(workspace.handle, "still_open")
        with mock.patch.object(module, "ops", graphs):
            leave(workspace, how)
            with pytest.raises(MnnvlArError, match="is closed" if how == "close" else "is asleep"):
                workspace.check()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the call waits"
        assert bool(out.isnan().all())
        assert len(said) == 1
        check_named(workspace, how, log, told)
    rank.barrier()
    if how == "close":
        module._give_back_kept()
        assert all(handle != workspace.handle for handle, *_ in module._kept)
        return
    break_rule(workspace.handle, "")
    workspace.wake(rank.group)
    workspace.check()
    check_calls(rank, [Call(tokens=2), Call(tokens=8)], handle=workspace.handle)
    rank.barrier()
    workspace.close()


def fail_and_be_told(rank: Any, workspace: Any, told: list[Exception]) -> None:
    """Rank 0 calls alone. Returns on all ranks when nobody watches any more."""
    from mnnvl_ar import ops

    if rank.rank == 0:
        workspace.deadline = 0.2
        with pytest.raises(RuntimeError):
            ops.all_reduce(torch.ones(2, 64), workspace.handle)
        workspace.deadline = 60.0
    until(lambda: workspace.handle not in watchers._monitor._watched, "it is not told")
    assert len(told) == 1
    told.clear()
    rank.barrier()


# ---- on GPUs: graphs


def check_replayed(rank: Any, how: str, stands_in: bool = True) -> None:
    """Graphs replayed while their workspace is gone, and right again when it is back. Without what stands in, the
    context is lost."""
    import mnnvl_ar.workspace as module

    told: list[Exception] = []
    workspace = rank.new_workspace(max_tokens=512, hidden=8192, deadline=5.0, on_fault=told.append)
    graphs = captured(rank, workspace)
    check_calls(rank, CALLS, handle=workspace.handle)
    check_replays(rank, graphs)
    rank.barrier()
    if not stands_in:
        workspace._memory.stand_in = tuple
    before = used(rank)
    for _ in range(1 if how == "close" else 3):
        told.clear()
        with Log() as log:
            leave(workspace, how)
            rank.barrier()
            assert used(rank) <= before - workspace.nbytes + (4 << 20)
            began = time.monotonic()
            replay_in_vain(rank, graphs)
            assert time.monotonic() - began < 4.0, "they end at once"
            check_named(workspace, how, log, told)
        rank.barrier()
        if how != "close":
            workspace.wake(rank.group)
            workspace.check()
            check_calls(rank, CALLS, handle=workspace.handle)
            check_replays(rank, graphs)
    if how != "close":
        rank.barrier()
        workspace.close(force=True)
        replay_in_vain(rank, graphs)
    graphs.clear()
    gc.collect()
    torch.cuda.synchronize()

    def is_given_back() -> bool:
        module._give_back_kept()
        return all(handle != workspace.handle for handle, *_ in module._kept)

    until(is_given_back, "the addresses were not given back")
    rank.barrier()


def replay_in_vain(rank: Any, graphs: list[tuple[Any, Any]]) -> None:
    for prepared, graph in graphs * 2:
        for output in prepared.outputs:
            output.zero_()
        graph.replay()
        rank.synchronize()
        assert all(bool(output.isnan().all()) for output in prepared.outputs)
    assert float(torch.ones(4, device=rank.device).sum()) == 4, "the context is alive"


def check_replayed_in_recovery(rank: Any) -> None:
    """A replay on a rank that waits for its peers in `recover`."""
    workspace = rank.new_workspace(**SMALL, deadline=5.0, monitor=False)
    graphs = captured(rank, workspace)
    check_replays(rank, graphs)
    rank.barrier()
    if rank.rank == 0:
        recovering = threading.Thread(target=workspace.recover, args=(rank.group,))
        recovering.start()
        until(lambda: workspace._memory.is_dropped, "it does not begin")
        time.sleep(0.5)
        replay_in_vain(rank, graphs)
        rank.store.set("replayed", "")
        recovering.join(PATIENCE)
    else:
        rank.store.wait(["replayed"])
        workspace.recover(rank.group)
    workspace.check()
    check_replays(rank, graphs)
    rank.barrier()
    workspace.close(force=True)
