"""Each rule of the protocol has a test on a device, and a control: it fails once the rule is switched off in a test
build.

Virtual ranks in a process of their own, since a control may leave kernels behind that wait for ever.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from common.cases.calls import Call, Prepared
from common.cases.rules import GPU_CHECKS, sabotaged
from common.ranks import TEST_LIBRARY, RankPool, RanksFailed

pytestmark = [
    pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build"),
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="alike on every machine; runs where there is one GPU"),
]


def check_wiped_rows(rank: Any, off: str) -> None:
    """Rule three_slots, as `check_wiped_data` has it, of a slot that takes some 50 us to clear. Peers wait so shortly
    that they still poll at full speed, and their next rows are there long before that."""
    workspace = sabotaged(rank, off, hidden=8192, max_tokens=512, strategy="one_shot")
    calls = [Call("all_reduce", tokens, 8192, "fp32", strategy=0, seed=tokens) for tokens in (512, 1)]
    prepared = [Prepared(rank, call) for call in calls]
    rank.barrier()
    for _ in range(20):
        prepared[0].launch(workspace.handle)
        if rank.rank == 0:
            rank.synchronize()
            time.sleep(0.0003)
        prepared[1].launch(workspace.handle)
    rank.synchronize()
    wrong = [line for each in prepared for line in each.wrong()]
    assert not wrong, "\n".join(wrong)
    rank.barrier()
    workspace.close()


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
