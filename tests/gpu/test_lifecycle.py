"""Sleep, recover, close and what ranks say of faults, with captured graphs, on one GPU a rank."""

import pytest

from common.cases.diagnosis import (
    check_absent,
    check_absent_in_many_ctas,
    check_different,
    check_marked,
    check_monitor,
    check_overwritten,
)
from common.cases.lifecycle import (
    check_closed_until_graphs_are_gone,
    check_closed_with_graphs,
    check_recover,
    check_rounds,
    check_sleep,
)
from common.ranks import RankPool, rank_pool

pytestmark = pytest.mark.gpu(2)


def test_sleep_keeps_graphs() -> None:
    rank_pool(2, "cuda").run(check_sleep)


def test_recover_keeps_graphs() -> None:
    rank_pool(2, "cuda").run(check_recover)


def test_close_with_graphs_alive() -> None:
    rank_pool(2, "cuda").run(check_closed_with_graphs)


def test_close_until_graphs_are_gone() -> None:
    rank_pool(2, "cuda").run(check_closed_until_graphs_are_gone)


def test_rounds_leave_nothing() -> None:
    rank_pool(2, "cuda").run(check_rounds, timeout=240)


@pytest.mark.parametrize("absent", [0, 1])
def test_absent_rank(absent: int) -> None:
    rank_pool(2, "cuda").run(check_absent, absent)


def test_absent_rank_of_large_calls() -> None:
    rank_pool(2, "cuda").run(check_absent_in_many_ctas)


@pytest.mark.gpu(4)
def test_absent_rank_of_four() -> None:
    rank_pool(4, "cuda").run(check_absent, 2)


def test_other_call() -> None:
    rank_pool(2, "cuda").run(check_different, 1)


@pytest.mark.gpu(4)
def test_other_call_of_four() -> None:
    rank_pool(4, "cuda").run(check_different, 2)


@pytest.mark.parametrize("offset", [28, 5000, 16380])
def test_overwritten_control_words(offset: int) -> None:
    rank_pool(2, "cuda").run(check_overwritten, offset)


def test_marked_by_the_rank_at_fault() -> None:
    rank_pool(2, "cuda").run(check_marked)


@pytest.mark.parametrize("watched", [True, False])
def test_monitor(watched: bool) -> None:
    with RankPool(2, "cuda") as pool:  # whose monitor's thread has to end with this test's workspace
        pool.run(check_monitor, watched)
