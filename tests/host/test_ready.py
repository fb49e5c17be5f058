"""The first and the last step of a bring-up are the workspace's own, and voted on: a rank that cannot let go of its
memory, or cannot load its kernels, fails on all."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from common.ranks import RankPool, rank_pool


def test_failure_is_everybodys() -> None:
    pool = RankPool(3, "cpu")
    errors = pool.run(check_no_kernels, 1)
    pool.close()
    assert len({repr(error) for error in errors}) == 1, errors
    rank, step, cause = errors[0]
    assert (rank, step) == (1, "ready")
    assert "no kernels" in cause


def check_no_kernels(rank: Any, victim: int) -> tuple[int, str, str]:
    """One rank fails after its memory was mapped; then the same ranks make a workspace, and it works."""
    import mnnvl_ar.workspace as module
    from mnnvl_ar import BringUpError, ops

    def broken(*arguments: Any, **named: Any) -> int:
        raise RuntimeError("no kernels for this device")

    good = module.create
    if rank.rank == victim:
        module.create = broken
    with pytest.raises(BringUpError) as caught:
        rank.new_workspace(hidden=64)
    module.create = good
    workspace = rank.new_workspace(hidden=64)
    out = ops.all_reduce(torch.ones(2, 64), workspace.handle)
    assert torch.equal(out, torch.full((2, 64), float(rank.world_size)))
    rank.barrier()
    workspace.close()
    return caught.value.rank, caught.value.step, caught.value.cause


@pytest.mark.parametrize("retry", [False, True])
def test_retry_is_asked_for(retry: bool) -> None:
    """What it does is in tests/memory/test_refusals.py."""
    assert rank_pool(2).run(told_of_refusals, retry) == [0 if retry else 2] * 2


def told_of_refusals(rank: Any, retry: bool) -> int:
    """From how many ranks a bring-up takes what was refused before."""
    from mnnvl_ar.memory.failures import Refusals

    with mock.patch.object(Refusals, "agree") as agree:
        rank.new_workspace(hidden=64, retry=retry and rank.rank == 1).close()
    return len(agree.call_args.args[0])


def test_a_rank_that_cannot_sleep_is_everybodys() -> None:
    errors = rank_pool(3).run(check_cannot_sleep, 1)
    assert errors == [(1, "prepare", "RuntimeError: a CUDA graph is being captured")] * 3


def check_cannot_sleep(rank: Any, victim: int) -> tuple[int, str, str]:
    """`recover` fails on one rank before it has begun; tried again, it works."""
    import mnnvl_ar.workspace as module
    from mnnvl_ar import BringUpError, ops

    workspace = rank.new_workspace(hidden=64)
    refuse = mock.Mock(side_effect=RuntimeError("a CUDA graph is being captured"))
    busy = mock.Mock(wraps=module.ops, _workspace_sleep=refuse) if rank.rank == victim else module.ops
    with mock.patch.object(module, "ops", busy), pytest.raises(BringUpError) as caught:
        workspace.recover(rank.group, timeout=20.0)
    workspace.recover(rank.group, timeout=20.0)
    out = ops.all_reduce(torch.ones(2, 64), workspace.handle)
    assert torch.equal(out, torch.full((2, 64), float(rank.world_size)))
    rank.barrier()
    workspace.close()
    return caught.value.rank, caught.value.step, caught.value.cause
