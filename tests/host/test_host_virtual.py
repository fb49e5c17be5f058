"""Virtual ranks, threads of one process, pass what real ones pass. On GPUs much rests on them, so they are held to it
here.
"""

import pytest

from common.cases.bad_input import check_bad_input
from common.cases.calls import check_calls
from common.cases.mixed import check_empty_calls, mixed_calls
from common.cases.traffic import check_epochs, check_traffic
from common.ranks import RanksFailed
from common.virtual_ranks import VirtualRank, VirtualRanks

WORKSPACE = {"max_tokens": 64, "hidden": 8192}


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_mixed_calls(ranks: int) -> None:
    VirtualRanks(ranks, "cpu").run(check_calls, mixed_calls(40, ranks, 1 << 15), WORKSPACE)


def test_traffic_epochs_and_refusals() -> None:
    ranks = VirtualRanks(3, "cpu")
    ranks.run(check_traffic, 200, [WORKSPACE, {**WORKSPACE, "strategy": "two_shot"}], hiddens=(64, 264), most_tokens=8)
    ranks.run(check_epochs, 2**32 - 4, 12, WORKSPACE)
    ranks.run(check_bad_input)
    ranks.run(check_empty_calls, WORKSPACE)
    ranks.close()


def test_failure_names_the_rank() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 1: Traceback.*only here") as failed:
        VirtualRanks(3, "cpu").run(fails_on_rank_1)
    assert "gave up" in failed.value.problems[0]


def fails_on_rank_1(rank: VirtualRank) -> None:
    if rank.rank == 1:
        raise ValueError("only here")
    rank.barrier()
