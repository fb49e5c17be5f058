"""The contract of an epilogue, on a GPU: tests/common/cases/outputs.py. Virtual ranks, in a process that has loaded the
test build."""

from typing import Any

import pytest
import torch

from common.cases import outputs
from common.ranks import TEST_LIBRARY, RankPool

pytestmark = [
    pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build"),
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="alike on every machine; runs where there is one GPU"),
]


def in_virtual_ranks(rank: Any, world_size: int, check: str) -> None:
    from common.virtual_ranks import VirtualRanks

    VirtualRanks(world_size).run(outputs.CHECKS[check], timeout=60)


@pytest.mark.parametrize("check", list(outputs.CHECKS))
def test_outputs_that_are_not_like_x(check: str) -> None:
    with RankPool(1, "cuda", library=TEST_LIBRARY) as pool:
        for world_size in (2, 3, 4, 8):  # 2, 4 and 8 are unrolled; 2 has forms of its own
            pool.run(in_virtual_ranks, world_size, check, timeout=90)
