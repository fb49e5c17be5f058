"""Worlds of 12, 16, 17, 24 and 72 ranks, bit for bit, on one GPU: kernels that await sixteen sources at a time.

A call of all ranks is one CUDA graph without edges, one CTA a rank (tests/common/many_ranks.py says why). Up to 24
ranks also run on streams, where each rank's calls follow each other with nothing between them but the ring.
By `pytest -m gpu -k many_ranks`. On the host: tests/host/test_host_many_ranks.py.
"""

from collections.abc import Iterator

import pytest
import torch

from common.cases.calls import check_calls
from common.cases.many import HIDDENS, TOKENS, WORLDS, calls_of_many
from common.cases.mixed import mixed_calls
from common.cases.traffic import check_epochs
from common.many_ranks import ManyRanks
from common.virtual_ranks import VirtualRanks
from mnnvl_ar import MnnvlArError

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="alike on every machine; runs where there is one GPU"),
]
ROUNDS = 4  # one more than the ring has slots, so that each call meets every slot


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    if torch.cuda.get_device_properties(0).multi_processor_count < size:
        pytest.skip(f"a GPU of fewer than {size} SMs does not hold a CTA of each rank at once")
    return size


@pytest.mark.parametrize("dtype", list(HIDDENS))
def test_many_ranks_at_once(world: int, dtype: str) -> None:
    with ManyRanks(world, TOKENS, max(HIDDENS[dtype]), dtype) as ranks:
        assert ranks.run(calls_of_many(dtype), ROUNDS) == []


@pytest.mark.parametrize("epoch", [2**31 - 2, 2**32 - 4])
def test_many_ranks_over_the_wrap_of_epochs(world: int, epoch: int) -> None:
    calls = calls_of_many("bf16")[:12]
    with ManyRanks(world, TOKENS, max(HIDDENS["bf16"]), "bf16") as ranks:
        for block in ranks.group.blocks:
            block[0] = epoch - (1 << 32) if epoch >> 31 else epoch
        torch.cuda.synchronize()
        assert ranks.run(calls) == []


def test_many_ranks_that_are_not_resident_at_once_are_named(world: int) -> None:
    """The control of all of these: with an edge between each rank and the next, the first waits for what cannot start,
    and ends by its deadline."""
    with (
        ManyRanks(world, TOKENS, max(HIDDENS["bf16"]), "bf16", deadline=0.2) as ranks,
        pytest.raises(MnnvlArError, match=r"rank 0 waited .* for rank"),
    ):
        ranks.run(calls_of_many("bf16")[:1], in_line=True)


def test_many_ranks_notice_one_in_another_call(world: int) -> None:
    """The last of them, three calls ahead, so that it writes into the right slot: its signature has another epoch."""
    calls = calls_of_many("bf16")[:1]
    with ManyRanks(world, TOKENS, max(HIDDENS["bf16"]), "bf16") as ranks:
        assert ranks.run(calls) == []
        ranks.group.blocks[-1][0] += 3
        torch.cuda.synchronize()
        with pytest.raises(MnnvlArError):
            ranks.run(calls)


@pytest.fixture(params=[size for size in WORLDS if size <= 24])
def on_streams(request: pytest.FixtureRequest) -> Iterator[VirtualRanks]:
    ranks = VirtualRanks(request.param)
    yield ranks
    ranks.close()


def test_many_ranks_on_streams(on_streams: VirtualRanks) -> None:
    """PDL is off: with calls that start early beside those at hand, 24 ranks of two CTAs would not find room."""
    calls = [call for call in mixed_calls(64, on_streams.world_size, 1 << 14, (0,)) if call.hidden <= 2880]
    on_streams.run(check_calls, calls, {"max_tokens": 64, "hidden": 2880, "deadline": 5.0, "strategy": "one_shot"})
    on_streams.run(check_epochs, 2**32 - 7, 20, {"max_tokens": 16, "hidden": 2880, "deadline": 5.0})
