"""Software multicast on one GPU when things go wrong: ranks that are late, or absent, or call something else. Guards
switched off: test_software_multicast.py.
"""

from typing import Any

import pytest
import torch

from common.cases import diagnosis, hostile, lost_rows, own_pieces, pieces
from common.cases.mixed import mixed_calls
from common.cases.software import SoftwareRanks
from common.ranks import TEST_LIBRARY, rank_pool

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build"),
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="alike on every machine; runs where there is one GPU"),
]
WORKSPACE = {"max_tokens": 64, "hidden": 8192, "deadline": 5.0}
PDLS = (-1, 0, 1, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 9])
def test_delays_in_kernels_and_a_late_rank(size: int) -> None:
    delayed = {**WORKSPACE, "deadline": 6.0}  # another workspace than that of other tests
    sizes = {"hiddens": (64, 2880, 7168), "most_tokens": 32, "pdls": (0, 1, 2)}
    calls = mixed_calls(32, 20 + size, 1 << 15, PDLS)
    SoftwareRanks(size).run(
        hostile.check_delays_in_kernels, calls, [delayed, {**delayed, "strategy": "two_shot"}], **sizes
    )


@pytest.mark.parametrize("size", [2, 3, 8])
def test_beside_other_work(size: int) -> None:
    SoftwareRanks(size).run(hostile.check_beside_other_work, mixed_calls(32, 30 + size, 1 << 15, PDLS), WORKSPACE)


@pytest.mark.parametrize(("size", "absent"), [(2, 0), (2, 1), (3, 2), (4, 1)])
def test_absent_rank(size: int, absent: int) -> None:
    SoftwareRanks(size).run(diagnosis.check_absent, absent)


def test_absent_rank_before_a_call_that_nothing_holds_back() -> None:
    SoftwareRanks(2).run(diagnosis.check_absent_before_an_unordered_call)


@pytest.mark.parametrize("late", [False, True], ids=["lost", "control-late"])
def test_lost_rows(late: bool) -> None:
    """Who is named shows where a peer's rows are looked for."""
    SoftwareRanks(1).run(lost_rows.check_lost_rows, late)


@pytest.mark.parametrize(("size", "odd"), [(2, 1), (3, 0), (4, 2)])
def test_other_call(size: int, odd: int) -> None:
    SoftwareRanks(size).run(diagnosis.check_different, odd)


def test_a_rank_that_had_not_come_to_a_call_that_differs() -> None:
    SoftwareRanks(4).run(diagnosis.check_bystander)


@pytest.mark.parametrize("what", [*diagnosis.DIFFERENCES])  # "" is the control
def test_a_call_that_differs_in_what_its_shape_does_not_say(what: str) -> None:
    SoftwareRanks(2).run(diagnosis.check_different_in, what)


@pytest.mark.parametrize("check", [pieces.check_left_in_the_middle, pieces.check_another_piece])
def test_a_rank_in_another_piece(check: Any) -> None:
    rank_pool(1, "cuda", library=TEST_LIBRARY).run(own_pieces.in_virtual_ranks, 2, check, timeout=60)
