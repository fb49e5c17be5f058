"""Calls larger than a slot, in pieces: tests/common/cases/pieces.py."""

from typing import Any

import pytest

from common.cases import pieces
from common.gpu_ranks import REAL
from common.places import gpus, host, virtual
from common.ranks import TEST_LIBRARY, rank_pool

PLACES = [host(2), host(3), host(4), virtual(2), virtual(3), virtual(8), *map(gpus, REAL)]


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
@pytest.mark.parametrize("strategy", [0, 1])
@pytest.mark.parametrize("ranks", PLACES, indirect=True)
def test_around_whole_pieces(ranks: Any, strategy: int, rows: int) -> None:
    ranks.run(pieces.check_boundaries, strategy, rows, timeout=120)


@pytest.mark.parametrize("ranks", PLACES, indirect=True)
def test_random_sizes(ranks: Any) -> None:
    ranks.run(pieces.check_random_sizes, 100, ranks.world_size, timeout=120)


@pytest.mark.parametrize("ranks", [host(2), virtual(2), gpus(2)], indirect=True)
def test_seventy_thousand_rows(ranks: Any) -> None:
    ranks.run(pieces.check_many_rows, 70_000, timeout=120)


@pytest.mark.parametrize("ranks", [host(1), *PLACES], indirect=True)
def test_any_shape(ranks: Any) -> None:
    ranks.run(pieces.check_any_shape, timeout=120)


# Needs a rank that leaves a call behind its first piece, which only a test build can.
CHECKS = [pieces.check_left_in_the_middle, pieces.check_another_piece]


@pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))])
def test_a_rank_in_another_piece(device: str, check: Any) -> None:
    pool = rank_pool(2, device, library=TEST_LIBRARY)
    try:
        pool.run(check, timeout=30)
    finally:
        pool.discard()


def in_virtual_ranks(rank: Any, check: Any) -> None:
    from common.virtual_ranks import VirtualRanks

    VirtualRanks(2).run(check, timeout=20)


@pytest.mark.gpu(1)
@pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")
@pytest.mark.parametrize("check", CHECKS)
def test_a_virtual_rank_in_another_piece(check: Any) -> None:
    pool = rank_pool(1, "cuda", library=TEST_LIBRARY)
    try:
        pool.run(in_virtual_ranks, check, timeout=40)
    finally:
        pool.discard()
