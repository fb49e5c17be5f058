"""bench/timing.py: what happens in which order, with a stand-in for the GPU that writes down what it is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import timing
from bench.cells import Cell
from bench.timing import Clock


class Event:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self) -> None:
        self.log.append("event")

    def elapsed_time(self, other: Event) -> float:
        return 1.0


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(told))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: told.append("sleep"), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("synchronize"))
    monkeypatch.setattr(timing.dist, "all_reduce", lambda *_, **__: told.append("token"))
    return told


def play(log: list[str], mode: str, l2: str = "warm") -> str:
    """One round of two variants."""
    clock: Any = Clock.__new__(Clock)
    clock.team = SimpleNamespace(barrier=lambda: log.append("barrier"), group=None)
    clock.on_gpu, clock._token = True, None
    clock._flush = SimpleNamespace(zero_=lambda: log.append("flush"))
    replays = [SimpleNamespace(run=lambda name=name: log.append(name), calls=20) for name in ("first", "second")]
    clock._round(Cell("fused", 2, 1, 256, "bfloat16", mode, l2), replays)
    return " ".join(log)


def test_graphs_queue_up_behind_a_sleep_and_start_together(log: list[str]):
    assert play(log, "graph") == (
        "barrier sleep token event first event token event second event synchronize"  # no CPU between two variants
    )


@pytest.mark.parametrize(("l2", "flush"), [("warm", ""), ("cold", "flush ")])
def test_eager_variants_all_start_on_an_idle_gpu(log: list[str], l2: str, flush: str):
    start = f"{flush}synchronize barrier event"
    assert play(log, "eager", l2) == f"barrier {start} first event {start} second event synchronize"
