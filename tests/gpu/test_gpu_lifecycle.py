"""Closing while captured graphs live, and faults of large calls; what holds on the host too is in tests/ranks."""

import pytest

from common.cases.diagnosis import check_absent_in_many_ctas
from common.cases.lifecycle import check_closed_until_graphs_are_gone, check_forced_while_a_graph_is_captured
from common.ranks import RankPool, rank_pool


def test_closed_by_force_while_a_graph_is_captured() -> None:
    with RankPool(1, "cuda") as pool:
        pool.run(check_forced_while_a_graph_is_captured)


@pytest.mark.gpu(2)
def test_close_until_graphs_are_gone() -> None:
    rank_pool(2, "cuda").run(check_closed_until_graphs_are_gone)


@pytest.mark.gpu(2)
def test_absent_rank_of_large_calls() -> None:
    rank_pool(2, "cuda").run(check_absent_in_many_ctas)
