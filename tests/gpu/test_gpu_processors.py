"""Fewer SMs than the device has: what ranks agree on holds, and a call where there is less is refused by name. And a
thread keeps the context that it is in. Each case has a process of its own, whose contexts end with it."""

from __future__ import annotations

import pytest

from common.cases import processors
from common.ranks import RankPool

SIZES = pytest.mark.parametrize("size", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (1, 2)])


@SIZES
def test_a_call_where_there_is_less_is_refused(size: int) -> None:
    with RankPool(size, "cuda") as pool:
        pool.run(processors.check_refused, timeout=60)


@SIZES
def test_a_workspace_made_where_there_is_less(size: int) -> None:
    with RankPool(size, "cuda") as pool:
        pool.run(processors.check_made_there, timeout=60)


def test_the_context_stays() -> None:
    with RankPool(1, "cuda") as pool:
        pool.run(processors.check_the_context_stays, timeout=60)


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.gpu(2))])
def test_a_thread_without_a_device(index: int) -> None:
    with RankPool(1, "cpu") as pool:  # which puts no rank on a GPU
        (untried,) = pool.run(processors.check_a_thread_without_a_device, index, timeout=60)
    if untried:
        pytest.skip(untried)
