"""Software multicast on one GPU: every compiled kernel, every form of launch, grids, and calls in pieces. The rest of
the bits: test_software_multicast.py.
"""

from typing import Any

import pytest
import torch

from common.cases import forms, outputs, own_pieces, pieces
from common.cases.calls import check_calls
from common.cases.graphs import check_graphs
from common.cases.software import SoftwareRanks
from common.ranks import TEST_LIBRARY, rank_pool

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build"),
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="alike on every machine; runs where there is one GPU"),
]
WORKSPACE = {"max_tokens": 64, "hidden": 8192, "deadline": 5.0}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_kernel(size: int) -> None:
    """Of worlds of 2, 4 and 8, which have their own, and of all others, which share theirs."""
    SoftwareRanks(size).run(forms.check_every_kernel)


def test_control_a_kernel_that_did_not_run_is_missed() -> None:
    """No calls of so many rows that they go four by four."""
    SoftwareRanks(4).fails("60 kernels ran", forms.check_every_kernel, forms.TOKENS[:2])


@pytest.mark.parametrize("pdl", [0, 1, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_every_form(size: int, pdl: int) -> None:
    SoftwareRanks(size).run(check_calls, forms.every_form(pdl), WORKSPACE)


@pytest.mark.parametrize("max_ctas", [1, 8, 32])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_grids(size: int, max_ctas: int) -> None:
    SoftwareRanks(size).run(check_calls, forms.calls_of_grids(), {**WORKSPACE, "max_ctas": min(max_ctas, 64 // size)})


def test_two_columns_a_thread() -> None:
    SoftwareRanks(2).run(check_calls, forms.calls_of_two_columns(), {**WORKSPACE, "max_ctas": 8})


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("check", list(outputs.CHECKS))
def test_an_epilogue_with_other_outputs(check: str, size: int) -> None:
    SoftwareRanks(size).run(outputs.CHECKS[check])


def in_pieces(size: int, check: Any, *arguments: Any, **named: Any) -> None:
    pool = rank_pool(1, "cuda", library=TEST_LIBRARY)
    pool.run(own_pieces.in_virtual_ranks, size, check, *arguments, timeout=90, **named)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("strategy", [0, 1])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_around_whole_pieces(size: int, strategy: int, rows: int) -> None:
    in_pieces(size, pieces.check_boundaries, strategy, rows)


def test_control_by_one_shot_own_rows_take_room() -> None:
    """Counted as over unicast, calls have more pieces than they should."""
    SoftwareRanks(2).fails("assert counts == ", pieces.check_boundaries, 0, 7)


@pytest.mark.parametrize("size", [2, 8])
def test_pieces_of_any_size_and_shape(size: int) -> None:
    in_pieces(size, pieces.check_random_sizes, 60, size)
    in_pieces(size, pieces.check_any_shape)


def test_very_many_pieces() -> None:
    in_pieces(2, pieces.check_many_rows, 20_000)


@pytest.mark.parametrize("size", [2, 4])
def test_captured_pieces(size: int) -> None:
    rows = {"row_bytes": 7168 * 4}  # of fp32; of the others, more fit
    ranks = SoftwareRanks(size)
    bound = max(own_pieces.bytes_with_own_rows(ranks, 4, strategy, **rows) for strategy in (0, 1))
    workspace = {**WORKSPACE, "max_bytes": bound}
    sizes = {"hiddens": (2880, 7168), "most_tokens": 32, "pdls": (0, 1, 2)}
    ranks.run(check_graphs, 60, [workspace, {**workspace, "strategy": "two_shot"}], 70 + size, **sizes)
