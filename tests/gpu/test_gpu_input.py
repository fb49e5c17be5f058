"""What is refused on GPUs, and the ops under opcheck, fakes and the compiler."""

from typing import Any

import pytest
import torch

from common.cases.bad_input import check_bad_input, check_bad_workspaces, expect
from common.cases.calls import Call, check_calls
from common.cases.compiled import check_compiles, check_fakes, check_ops, check_wanted_is_traced
from common.gpu_ranks import ranks_of
from common.ranks import rank_pool

REAL = [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (1, 2)]
once = pytest.mark.skipif(torch.cuda.device_count() != 1, reason="alike on every machine; runs where there is one GPU")


def test_calls_are_refused_by_virtual_ranks() -> None:
    assert len(ranks_of("virtual", 2).run(check_bad_input)[0]) >= 34


@pytest.mark.parametrize("gpus", REAL)
def test_calls_are_refused(gpus: int) -> None:
    rank_pool(gpus, "cuda").run(check_bad_input)


@pytest.mark.parametrize("gpus", REAL)
def test_workspaces_are_refused(gpus: int) -> None:
    rank_pool(gpus, "cuda").run(check_bad_workspaces)


@pytest.mark.parametrize("gpus", REAL)
def test_workspace_in_capture_is_refused(gpus: int) -> None:
    rank_pool(gpus, "cuda").run(check_workspace_in_capture)


def check_workspace_in_capture(rank: Any) -> None:
    import mnnvl_ar

    options = {"max_tokens": 8, "hidden": 64, "dtype": torch.bfloat16}
    x = torch.ones(8, device=rank.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        expect(lambda: rank.new_workspace(**options), "is capturing", "capture", mnnvl_ar.BringUpError)
    graph.replay()  # the capture has come to no harm
    rank.synchronize()
    assert x.eq(2).all()
    with rank.new_workspace(**options) as workspace:
        check_calls(rank, [Call(tokens=2)], handle=workspace.handle)
        rank.barrier()


@once
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_opcheck(dtype: str) -> None:
    rank_pool(1, "cuda").run(check_ops, dtype)


@once
def test_fakes_and_traces() -> None:
    rank_pool(1, "cuda").run(check_fakes)
    rank_pool(1, "cuda").run(check_wanted_is_traced)


@once
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend: str) -> None:
    rank_pool(1, "cuda").run(check_compiles, backend, timeout=120)
