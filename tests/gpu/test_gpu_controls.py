"""Each rule of the protocol has a test on a device, and a control: it fails once the rule is switched off in a test
build.

Virtual ranks in a process of their own, since a control may leave kernels behind that wait for ever.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from common.cases.rules import GPU_CHECKS, check_wiped_data
from common.ranks import TEST_LIBRARY, RankPool, RanksFailed

pytestmark = [
    pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build"),
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="alike on every machine; runs where there is one GPU"),
]


def check_wiped_rows(rank: Any, off: str) -> None:
    """Of a slot that takes some 50 us to clear. Peers wait so shortly that they still poll at full speed, and their
    next rows are there long before that."""
    check_wiped_data(rank, off, tokens=512, pause=0.0003)


CHECKS = {rule: check for rule, (check, _, _) in GPU_CHECKS.items()} | {"three_slots": check_wiped_rows}


def in_virtual_ranks(rank: Any, world_size: int, rule: str, off: str) -> None:
    """Runs by a single process, which makes its virtual ranks itself."""
    from common.virtual_ranks import VirtualRanks

    VirtualRanks(world_size).run(CHECKS[rule], off, timeout=6)


def warm(rank: Any) -> None:
    """What takes long in a new process: CUDA's start, and loading the kernels."""
    from common.virtual_ranks import VirtualRanks

    VirtualRanks(2).run(check_nothing)


def check_nothing(rank: Any) -> None:
    rank.new_workspace(hidden=64).close()


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, RankPool]]:
    """One for all that must hold, by the name "", and one for each control; they start side by side."""
    pools = {rule: RankPool(1, "cuda", library=TEST_LIBRARY) for rule in ("", *GPU_CHECKS)}
    for running in [pool.start(warm) for pool in pools.values()]:
        running.results(60)
    yield pools
    for pool in pools.values():
        pool.discard()


@pytest.mark.parametrize("rule", list(GPU_CHECKS))
def test_holds_with(rule: str, processes: dict[str, RankPool]) -> None:
    processes[""].run(in_virtual_ranks, GPU_CHECKS[rule][1], rule, "", timeout=20)


@pytest.mark.parametrize("rule", list(GPU_CHECKS))
def test_fails_without(rule: str, processes: dict[str, RankPool]) -> None:
    _, world_size, says = GPU_CHECKS[rule]
    try:
        with pytest.raises(RanksFailed, match=says):
            processes[rule].run(in_virtual_ranks, world_size, rule, rule, timeout=10)
    finally:
        processes[rule].discard()
