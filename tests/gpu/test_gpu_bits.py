"""Both ops on GPUs give the reference's bits: every property of a call mixed, then each on its own."""

from typing import Any

import pytest

from common.cases import forms
from common.cases.calls import Call, check_calls
from common.cases.mixed import mixed_calls
from common.cases.traffic import check_traffic
from common.ranks import RankPool

WORKSPACE = {"max_tokens": 64, "hidden": 8192, "deadline": 5.0}
PDLS = (-1, 0, 1, 2)


def test_mixed_calls(ranks: Any) -> None:
    ranks.run(check_calls, mixed_calls(64, ranks.world_size, 1 << 15, PDLS), WORKSPACE)


def test_every_kernel(ranks: Any) -> None:
    """That is compiled for so many ranks, by the names in graphs of virtual ones."""
    if ranks.world_size == 9 or isinstance(ranks, RankPool):
        pytest.skip("virtual ranks of the sizes that have kernels of their own, and of one that has not")
    ranks.run(forms.check_every_kernel)


def test_long_rows_and_many_tokens(ranks: Any) -> None:
    calls = [
        Call(op, tokens, hidden, "bf16", strategy=strategy, seed=tokens)
        for op in ("all_reduce", "all_reduce_rms_norm")
        for tokens, hidden in ((64, 2880), (64, 7168), (3, 16384), (33, 24), (1, 8))
        for strategy in (0, 1)
    ]
    # Made for one-shot, the larger of the two, so that both may be forced at every size.
    ranks.run(check_calls, calls, {**WORKSPACE, "strategy": "one_shot"})


def test_a_share_smaller_than_a_cluster(ranks: Any) -> None:
    """Nine ranks share a GPU, each for less than one row's cluster. The narrowest is taken then: by the widest, eight
    ranks' calls, those at hand and the next ones, which are launched early, leave no place for the ninth's (16
    clusters of 8 of 132 SMs), and all wait for the deadline."""
    if ranks.world_size != 9:
        pytest.skip("of nine ranks")
    calls = [Call(tokens=3, hidden=16384, dtype="bf16", strategy=s, seed=3) for s in (0, 1)] * 8
    ranks.run(check_calls, calls, {**WORKSPACE, "strategy": "one_shot", "deadline": 2.0}, late=0.02)


@pytest.mark.parametrize("pdl", [0, 1, 2])
def test_every_form(ranks: Any, pdl: int) -> None:
    if ranks.world_size not in (2, 4, 8):
        pytest.skip("forms do not depend on the world size")
    ranks.run(check_calls, forms.every_form(pdl), WORKSPACE)


@pytest.mark.parametrize("max_ctas", [1, 8, 32])
def test_grids(ranks: Any, max_ctas: int) -> None:
    """The bits do not depend on the grid, nor on how many CTAs hold a row, nor on whether rows queue up; also where
    outputs lie over x, of which a cluster loads the next row before it stores this one's."""
    if ranks.world_size not in (2, 8):
        pytest.skip("two world sizes show it")
    ranks.run(check_calls, forms.calls_of_grids(), {**WORKSPACE, "max_ctas": min(max_ctas, 64 // ranks.world_size)})


def test_two_columns_a_thread(ranks: Any) -> None:
    """Of two ranks, where eight CTAs hold all rows only by two columns a thread: rows of whole groups of 32 vectors, of
    an odd number, and with one that is not full. And next to them, where rows queue up all the same, by one column a
    thread (7168) or by two (8192)."""
    if ranks.world_size != 2:
        pytest.skip("of two ranks")
    ranks.run(check_calls, forms.calls_of_two_columns(), {**WORKSPACE, "max_ctas": 8})


def test_traffic(ranks: Any) -> None:
    sizes = {"hiddens": (64, 264, 2880, 7168), "most_tokens": 32, "pdls": PDLS}
    workspaces = [WORKSPACE, {**WORKSPACE, "strategy": "two_shot"}]
    ranks.run(check_traffic, 300, workspaces, ranks.world_size, **sizes)
