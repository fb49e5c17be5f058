"""Milliseconds a step, from runs whose answer is known."""

import random

import pytest

from servers.measures import ms_a_step


@pytest.mark.parametrize("hiccups", [0, 2])
def test_a_few_runs_that_something_else_held_up_move_little(hiccups: int) -> None:
    """3.5 ms a step, runs that vary by 2 ms, and of eight two that took 0.3 s more: in one round the difference is then
    0, in another half as much again."""
    draw = random.Random(1)
    short, long = (
        [
            steps * 3.5e-3 + 0.05 + draw.gauss(0, 0.002) + 0.3 * (number % 4 == which) * (hiccups > 0)
            for number in range(8)
        ]
        for steps, which in ((16, 0), (144, 1))
    )
    found = ms_a_step(short, long, 128)
    assert found["median_ms"] == pytest.approx(3.5, rel=0.01)
    low, high = found["quartiles_ms"]
    assert low < found["median_ms"] < high
    worst = max(abs(1e3 * (b - a) / 128 - 3.5) for a, b in zip(short, long, strict=True))
    assert (worst > 2.0) == (hiccups > 0), "what a single round would say"
