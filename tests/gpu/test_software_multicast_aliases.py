"""Blocks that are seen through two mappings, as over a multicast (docs/multicast.md): sent to by one, looked at and
cleared by the other. On one GPU, by software multicast; what is sent by which, says tests/common/cases/aliased.py.

The control is a second mapping of other memory: then nothing comes, and calls end at their deadline.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from common.cases import aliased
from common.cases.calls import check_calls
from common.cases.graphs import check_graphs
from common.cases.mixed import mixed_calls
from common.cases.traffic import check_epochs, check_traffic
from common.ranks import TEST_LIBRARY, rank_pool

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build"),
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="alike on every machine; runs where there is one GPU"),
]
WORKSPACE = {"max_tokens": 64, "hidden": 8192, "deadline": 5.0}
PDLS = (0, 1, 2)
SIZES = {"hiddens": (64, 2880, 7168), "most_tokens": 32, "pdls": PDLS}
SHORT = {"max_tokens": 64, "hidden": 8192, "deadline": 0.5}
EPOCHS = 2**32 - 1


@pytest.fixture(params=[1, 2, 3])
def size(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


def run(world_size: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    pool = rank_pool(1, "cuda", library=TEST_LIBRARY)
    pool.run(aliased.in_aliased_ranks, world_size, function, *arguments, timeout=90, **named)


def test_all_that_is_sent_goes_by_the_other_mapping(size: int) -> None:
    run(size, aliased.check_replays, mixed_calls(32, size, 1 << 15, (-1, *PDLS)), WORKSPACE)


def test_graphs_by_the_other_mapping_and_eager_calls_by_both(size: int) -> None:
    workspaces = [WORKSPACE, {**WORKSPACE, "strategy": "two_shot"}]
    run(size, check_graphs, 60, workspaces, size, **SIZES)


def test_eager_calls_by_both(size: int) -> None:
    run(size, check_calls, mixed_calls(32, 10 + size, 1 << 15, (-1, *PDLS)), WORKSPACE)
    run(size, check_traffic, 100, [WORKSPACE, {**WORKSPACE, "strategy": "two_shot"}], size, **SIZES)
    run(size, check_epochs, EPOCHS - 6, 20, {"max_tokens": 16, "hidden": 2880, "deadline": 5.0})


def test_what_came_by_the_other_mapping_is_cleared() -> None:
    run(1, aliased.check_clears)


def test_control_without_clears_it_is_not() -> None:
    run(1, aliased.check_clears, "clear", says="slots hold")


def test_control_by_a_mapping_of_other_memory_nothing_comes(size: int) -> None:
    run(size, aliased.check_replays, mixed_calls(4, size, 1 << 12), SHORT, apart=True, says="PeerTimeout")


def test_control_of_one_rank_own_rows_come_when_sent_by_the_first_mapping() -> None:
    """So it is the mapping that the control before this one fails by."""
    run(1, check_calls, mixed_calls(4, 1, 1 << 12), SHORT, apart=True)
