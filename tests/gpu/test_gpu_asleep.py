"""CUDA graphs that are replayed while their workspace sleeps, recovers, or has been closed by force. Each case has a
process of its own, since the control loses its context."""

from __future__ import annotations

import pytest

from common.cases import asleep
from common.ranks import RankPool, RanksFailed

SIZES = [pytest.param(1, marks=pytest.mark.gpu(1)), pytest.param(2, marks=pytest.mark.gpu(2))]


@pytest.mark.parametrize("how", asleep.WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_replays_end_with_nan_and_a_name(size: int, how: str) -> None:
    with RankPool(size, "cuda") as pool:
        pool.run(asleep.check_replayed, how, timeout=60)


@pytest.mark.parametrize("how", ["sleep", "close"])
def test_control_without_what_stands_in_the_context_is_lost(how: str) -> None:
    pool = RankPool(1, "cuda")
    try:
        with pytest.raises(RanksFailed, match=r"CUDA error|cudaError|CUDA_ERROR|exit code|still running"):
            pool.run(asleep.check_replayed, how, False, timeout=40)
    finally:
        pool.discard()


@pytest.mark.gpu(2)
def test_a_replay_during_a_recovery() -> None:
    with RankPool(2, "cuda") as pool:
        pool.run(asleep.check_replayed_in_recovery, timeout=60)
