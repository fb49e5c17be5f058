"""Hostile timing: delays inside kernels, SMs taken away, grids of every size, predecessors that trigger early and never
wait, two workspaces side by side. Right bits, and no hang; test_gpu_controls.py has the rules that see to it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.cases.calls import Call, Prepared, check_calls
from common.gpu_ranks import ranks_of
from common.ranks import TEST_LIBRARY, rank_pool
from tools.replay.gpu import serve
from tools.replay.host import total
from tools.replay.script import Profile, vllm

SIZES: dict[str, Any] = {
    "hidden": 4096,
    "layers": 8,
    "max_tokens": 128,
    "forwards": 150,
    "late": 0.005,
    "impatient": True,
}
REAL = pytest.mark.parametrize("world_size", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (2, 4, 8)])
needs_test_build = pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")


@needs_test_build
@REAL
def test_delays_in_kernels(world_size: int) -> None:
    pool = rank_pool(world_size, "cuda", library=TEST_LIBRARY)
    for aside in (True, False):
        script = vllm(Profile(world_size, 11, aside=aside, **SIZES))
        figures = total(pool.run(serve, script, delay_ns=20_000, timeout=100))
        assert figures["wrong_rows"] == 0, figures


@REAL
def test_hogged_device(world_size: int) -> None:
    figures = total(
        ranks_of("real", world_size).run(serve, vllm(Profile(world_size, 12, **SIZES)), hog=True, timeout=200)
    )
    assert figures["wrong_rows"] == 0, figures


@REAL
@pytest.mark.parametrize("share", [0, 0.5, 2], ids=["one-cta", "half", "twice-what-fits"])
def test_grids(world_size: int, share: float) -> None:
    """However many CTAs are asked for, the grid is what fits; and however few."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    calls = [Call(tokens=t, hidden=h, strategy=s, seed=t) for t in (1, 33, 256) for h in (2880, 8192) for s in (0, 1)]
    options = {"max_tokens": 1024, "hidden": 8192, "max_ctas": max(1, int(share * 2 * processors))}
    ranks_of("real", world_size).run(check_calls, calls, options)


@REAL
def test_two_workspaces_side_by_side(world_size: int) -> None:
    """Two streams, a workspace each, as many CTAs as there are, calls back to back and launched early."""
    ranks_of("real", world_size).run(check_side_by_side, 150, timeout=60)


def check_side_by_side(rank: Any, rounds: int) -> None:
    """Ranks launch on the streams in different orders. Whatever is resident early on one stream must leave room for
    what a peer waits for on the other.
    """
    options = {"max_tokens": 1024, "hidden": 4096, "deadline": 5.0}
    workspaces = [rank.new_workspace(**options) for _ in range(2)]
    streams = [torch.cuda.Stream(rank.device) for _ in range(2)]
    calls = [Prepared(rank, Call(tokens=t, hidden=4096, out="E", seed=t, pdl=2)) for t in (512, 512)]
    rank.barrier()
    for number in range(rounds):
        for n in (0, 1) if (number + rank.rank) % 2 else (1, 0):
            with torch.cuda.stream(streams[n]):
                for _ in range(4):
                    calls[n].launch(workspaces[n].handle)
    for stream in streams:
        stream.synchronize()
    for workspace in workspaces:
        workspace.check()
    wrong = [line for call in calls for line in call.wrong()]
    assert not wrong, "\n".join(wrong)
    rank.barrier()
    for workspace in workspaces:
        workspace.close()
