"""A workspace in a capture is refused; what is refused on the host too is in tests/ranks."""

from typing import Any

import pytest
import torch

from common.cases.bad_input import expect
from common.cases.calls import Call, check_calls
from common.ranks import rank_pool

REAL = [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (1, 2)]


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
