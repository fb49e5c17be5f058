"""Faults are named on every rank; the matrix of all kinds is tools/faults."""

import statistics
from typing import Any

import pytest

from common.cases.diagnosis import (
    DIFFERENCES,
    check_a_difference_that_is_gone,
    check_absent,
    check_absent_before_an_unordered_call,
    check_bystander,
    check_deadline_set_meanwhile,
    check_different,
    check_different_in,
    check_hold,
    check_marked,
    check_monitor,
    check_overwritten,
    check_overwritten_widely,
    check_signed_twice,
)
from common.places import gpus, host, virtual
from common.ranks import RankPool


@pytest.mark.parametrize(
    ("ranks", "absent"),
    [host(2, 0), host(3, 2), host(4, 1), gpus(2, 0), gpus(2, 1), gpus(4, 2)],
    indirect=["ranks"],
)
def test_absent_rank(ranks: Any, absent: int) -> None:
    """Of three times the middle one counts, as any machine may stand still once."""
    took = [max(ranks.run(check_absent, absent, 20.0)) for _ in range(3)]
    assert statistics.median(took) < 1.5, took


@pytest.mark.parametrize(
    ("ranks", "odd"), [host(2, 0), host(3, 0), host(4, 3), gpus(2, 1), gpus(4, 2)], indirect=["ranks"]
)
def test_other_call(ranks: Any, odd: int) -> None:
    ranks.run(check_different, odd)


@pytest.mark.parametrize("ranks", [host(4), virtual(4), gpus(4)], indirect=True)
def test_a_rank_that_had_not_come_to_a_call_that_differs(ranks: Any) -> None:
    ranks.run(check_bystander)


@pytest.mark.parametrize("ranks", [virtual(2), gpus(2)], indirect=True)
def test_absent_rank_before_a_call_that_nothing_holds_back(ranks: Any) -> None:
    ranks.run(check_absent_before_an_unordered_call)


@pytest.mark.parametrize("what", DIFFERENCES)
@pytest.mark.parametrize("ranks", [host(2), host(3), virtual(2), gpus(2)], indirect=True)
def test_a_call_that_differs_in_what_its_shape_does_not_say(ranks: Any, what: str) -> None:
    ranks.run(check_different_in, what)


@pytest.mark.parametrize("ranks", [host(2), virtual(2)], indirect=True)
def test_calls_that_differ_in_nothing_that_is_signed(ranks: Any) -> None:
    ranks.run(check_different_in, "")


OFFSETS = (32, 1020, 8000, 10236, 16380)


@pytest.mark.parametrize(
    ("ranks", "offset"),
    [*(host(2, offset) for offset in OFFSETS), *(gpus(2, offset) for offset in OFFSETS[::2])],
    indirect=["ranks"],
)
def test_overwritten_control_words(ranks: Any, offset: int) -> None:
    ranks.run(check_overwritten, offset)


@pytest.mark.parametrize("word", [0, 1, 64, 100, 0x40404040, -1])
@pytest.mark.parametrize("ranks", [host(2), host(3)], indirect=True)
def test_widely_overwritten_control_words(ranks: Any, word: int) -> None:
    ranks.run(check_overwritten_widely, word)


@pytest.mark.parametrize("ranks", [host(2), gpus(2)], indirect=True)
def test_marked_by_the_rank_at_fault(ranks: Any) -> None:
    ranks.run(check_marked)


@pytest.mark.parametrize("ranks", [host(2), host(3)], indirect=True)
def test_a_rank_that_has_signed_two_calls_as_one(ranks: Any) -> None:
    ranks.run(check_signed_twice)


@pytest.mark.parametrize("ranks", [host(2), host(3)], indirect=True)
def test_a_difference_that_is_gone(ranks: Any) -> None:
    ranks.run(check_a_difference_that_is_gone)


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))])
def test_monitor(device: str, watched: bool) -> None:
    with RankPool(2, device) as pool:  # whose monitor's thread has to end with this test's workspace
        pool.run(check_monitor, watched)


@pytest.mark.parametrize(("hold", "watched"), [(3.0, True), (0.0, True), (0.6, False)])
@pytest.mark.parametrize("ranks", [host(2), gpus(2)], indirect=True)
def test_a_stream_is_held_until_the_process_has_decided(ranks: Any, hold: float, watched: bool) -> None:
    ranks.run(check_hold, hold, watched)


@pytest.mark.parametrize("ranks", [host(2), gpus(2)], indirect=True)
def test_a_deadline_that_is_set_later(ranks: Any) -> None:
    ranks.run(check_deadline_set_meanwhile)
