"""The contract of an epilogue, held by one that only test builds have: tests/common/cases/outputs.py."""

from typing import Any

import pytest
import torch

from common.cases import outputs
from common.ranks import TEST_LIBRARY, RankPool, rank_pool

pytestmark = pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("check", list(outputs.CHECKS))
def test_on_the_host(check: str, world_size: int) -> None:
    rank_pool(world_size, library=TEST_LIBRARY).run(outputs.CHECKS[check])


def in_virtual_ranks(rank: Any, world_size: int, check: str) -> None:
    from common.virtual_ranks import VirtualRanks

    VirtualRanks(world_size).run(outputs.CHECKS[check], timeout=60)


@pytest.mark.gpu(1)
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="alike on every machine; runs where there is one GPU")
@pytest.mark.parametrize("check", list(outputs.CHECKS))
def test_on_a_gpu(check: str) -> None:
    """Virtual ranks, in a process that has loaded the test build."""
    with RankPool(1, "cuda", library=TEST_LIBRARY) as pool:
        for world_size in (2, 3, 4, 8):  # 2, 4 and 8 are unrolled; 2 has forms of its own
            pool.run(in_virtual_ranks, world_size, check, timeout=90)


def test_inputs_can_tell_right_from_wrong() -> None:
    outputs.check_inputs_are_hostile()
