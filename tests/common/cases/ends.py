"""How workspaces end: closed once or twice, after the group, in a forked child, or with a rank that is killed."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from common.cases.bad_input import expect
from common.cases.calls import Call, check_calls

SMALL = {"max_tokens": 8, "hidden": 64, "dtype": torch.bfloat16}


def held() -> tuple[int, int]:
    """(open file descriptors, mappings of shared memory) of this process."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("memfd:") + maps.count("/dev/shm/")


def check_closes(rank: Any) -> None:
    """A workspace that is closed gives everything back, once; the op says that it is closed."""
    from mnnvl_ar import ops

    rank.new_workspace(**SMALL).close()
    rank.barrier()
    before = held()
    for number in range(5):
        workspace = rank.new_workspace(**SMALL)
        check_calls(rank, [Call(tokens=2, seed=number)], handle=workspace.handle)
        rank.barrier()
        workspace.close()
        workspace.close()
        expect(lambda w=workspace: ops.all_reduce(torch.ones(1, 64), w.handle), "is closed", "closed")
        assert "closed" in repr(workspace)
    rank.barrier()
    assert held() == before


def check_dropped(rank: Any) -> None:
    """A workspace that nobody holds any more is not closed, since its handle may be in use; a log line says so."""
    import gc
    import logging

    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mnnvl_ar").addHandler(handler)
    try:
        kept = rank.new_workspace(**SMALL)
        dropped = rank.new_workspace(**SMALL)
        handle = dropped.handle
        del dropped
        gc.collect()
        check_calls(rank, [Call(tokens=2)], handle=handle)
        kept.close()
        del kept
        gc.collect()
    finally:
        logging.getLogger("mnnvl_ar").removeHandler(handler)
    assert len(texts) == 1, texts
    assert f"workspace {handle} was dropped without close()" in texts[0]


def check_closes_without_group(rank: Any) -> None:
    """`close` needs no process group. The rank is of no use afterwards."""
    import torch.distributed as dist

    workspace = rank.new_workspace(**SMALL)
    check_calls(rank, [Call(tokens=2)], handle=workspace.handle)
    rank.barrier()
    dist.destroy_process_group()
    workspace.close()
    workspace.close()
    assert held()[1] == 0


def check_forked(rank: Any) -> None:
    """In a forked child the parent's workspace is refused, closing it there does nothing, one of the child's own works,
    and the parent goes on."""
    from mnnvl_ar import ops

    workspace = rank.workspace(**SMALL)
    check_calls(rank, [Call(tokens=2)], handle=workspace.handle)
    child = os.fork()
    if child == 0:
        try:
            expect(
                lambda: ops.all_reduce(torch.ones(1, 64), workspace.handle),
                "belongs to the parent of this forked",
                "fork",
            )
            workspace.close()
            check_own_workspace()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    check_calls(rank, [Call(tokens=3)], handle=workspace.handle)


def check_own_workspace() -> None:
    """Made over a group that is not the default one of this process; nothing is left of it."""
    import torch.distributed as dist

    from mnnvl_ar import Workspace, ops

    _, before = held()
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)  # not of this process's default group, and with no backend
    workspace = Workspace(group, 8, 64, torch.float32, device="cpu")
    assert torch.equal(ops.all_reduce(torch.ones(2, 64), workspace.handle), torch.ones(2, 64))
    workspace.check()
    workspace.close()
    assert held()[1] == before


def open_workspaces(rank: Any) -> None:
    """Leaves workspaces behind that have been used."""
    for hidden in (64, 4096):
        check_calls(rank, [Call(tokens=2)], {"hidden": hidden, "deadline": 1.0})


def survive(rank: Any, victim: int) -> str:
    """Calls while `victim` is killed, until that shows; every rank but `victim` returns the error's name."""
    import mnnvl_ar

    workspace = rank.workspace(hidden=64, deadline=1.0)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            mnnvl_ar.ops.all_reduce(torch.ones(1, 64), workspace.handle)
        except RuntimeError:
            break
    try:
        workspace.check()
    except mnnvl_ar.WorkspaceBroken as error:
        rank.forget_workspaces()
        assert held()[1] == 0
        return type(error).__name__
    raise AssertionError(f"rank {rank.rank} never noticed that rank {victim} is gone")
