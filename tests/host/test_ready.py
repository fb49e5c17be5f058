"""The last step of a bring-up makes the handle, and is voted on: a rank that cannot load its kernels fails on all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.ranks import RankPool


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
