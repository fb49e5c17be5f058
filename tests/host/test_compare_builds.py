"""tools/compare_builds.py takes no time of a build that answers wrong."""

from typing import Any

import pytest
import torch

from common.virtual import VirtualGroup
from tools.compare_builds import Call, Cell, measured


def answered(cell: Cell, deadline: float = 20.0, only: int | None = None) -> list[Call]:
    """Of every rank of a group, or, by `only`, of one that the others leave alone."""
    group = VirtualGroup(cell.ranks, cell.tokens, cell.hidden, torch.bfloat16, deadline=deadline)
    calls = [Call(cell, group, rank) for rank in range(cell.ranks)]
    if only is None:
        group.each(lambda rank: calls[rank]())
    else:
        with pytest.raises(RuntimeError):
            calls[only]()
    return calls


@pytest.mark.parametrize("op", ["plain", "fused"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_right_answers_pass(op: str, ranks: int) -> None:
    for call in answered(Cell("chain", ranks, op, 2, 64)):
        call.check()


@pytest.mark.parametrize(
    ("op", "output", "value"),
    [("plain", "out", 1.0), ("plain", "out", float("nan")), ("fused", "out", 1.0), ("fused", "norm", 0.125)],
)
def test_a_wrong_answer_is_told(op: str, output: str, value: float) -> None:
    call = answered(Cell("chain", 1, op, 2, 64))[0]
    getattr(call, output)[1, 3] += value
    with pytest.raises((RuntimeError, AssertionError), match=r"wrong bits|not close"):
        call.check()


def test_a_fault_is_told_though_what_was_stored_is_right() -> None:
    call = answered(Cell("chain", 2, "plain", 1, 64), deadline=0.2, only=0)[0]
    call.out.copy_(call.x * 2)
    with pytest.raises(RuntimeError, match="a fault was met"):
        call.check()


@pytest.mark.parametrize("of_others", [False, True])
def test_each_time_is_checked(monkeypatch: pytest.MonkeyPatch, of_others: bool) -> None:
    """And rows of others, as GEMMs make them, do not stand for the call's own."""
    call = answered(Cell("gemm", 1, "plain", 2, 64))[0]
    monkeypatch.setattr("tools.compare_builds.timed", lambda *_: float(call(call.x + 1).sum() * 0 + 2))
    arguments: tuple[Any, ...] = (None, 1, [], [call])
    if of_others:
        assert measured(*arguments, of_others=True) == 2.0
    else:
        with pytest.raises(RuntimeError, match="wrong bits"):
            measured(*arguments)
