"""tools/compare_builds.py takes no time of a build that answers wrong."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.virtual import VirtualGroup
from tools import compare_builds
from tools.compare_builds import Call, Cell, measured, order


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


@pytest.mark.parametrize("builds", [2, 3, 4, 5])
def test_each_build_has_each_place_equally_often(builds: int) -> None:
    for turn in range(2 * builds):
        places = [order(builds, turn, pair) for pair in range(builds)]
        assert all(sorted(place) == list(range(builds)) for place in (*places, *zip(*places, strict=True)))
    starts = [order(builds, turn) for turn in range(2 * builds)]
    for place in zip(*starts, strict=True):
        assert sorted(place) == sorted([*range(builds)] * 2)


def test_neither_of_two_always_follows_the_other() -> None:
    assert [order(2, turn) for turn in range(4)] == [[0, 1], [1, 0], [1, 0], [0, 1]]


def test_the_place_of_a_build_is_not_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three alike, of which the one that starts second is the quicker. The control: that is always the same one."""
    monkeypatch.setattr(compare_builds, "Build", Placed)
    options = "--old a --new b --new c --cells chains --turns 6 --out"
    monkeypatch.setattr(sys, "argv", ["compare_builds", *options.split(), f"{tmp_path}/o"])
    assert (compare_builds.main(), rows(tmp_path)) == (0, [])
    monkeypatch.setattr(compare_builds, "order", lambda builds, turn, pair=0: [[0, 1, 2], [2, 1, 0]][(turn + pair) % 2])
    assert (compare_builds.main(), rows(tmp_path)) == (1, [("c", "b")] * 16)


class Placed:
    """A build that takes as long as its place among those that run makes it."""

    running = 0

    def __init__(self, folder: Path) -> None:
        self.place = Placed.running
        Placed.running += 1

    def measure(self, cell: Cell) -> float:
        return (2.0, 1.8, 2.0)[self.place]

    def end(self) -> None:
        Placed.running -= 1


def rows(folder: Path) -> list[tuple[str, str]]:
    """(build, against) of the cells that are slower."""
    return [(row["build"], row["against"]) for row in json.loads((folder / "o").read_text()) if row["slower"]]
