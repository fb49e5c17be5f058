"""A server's script of calls over the host transport, with real processes: every real row of every replay is compared,
bit for bit. Each rule that the host knows is switched off once, and must be caught by the same scripts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from common.ranks import TEST_LIBRARY, RanksFailed, rank_pool
from tools.replay.host import serve, total
from tools.replay.script import Capture, Forward, Profile, Script, sglang, vllm

made: dict[int, list[int]] = {}  # calls, by seed
FRESH = int.from_bytes(os.urandom(4), "little")

# (engine, ranks, what else): together more than 20,000 calls under each seed
SCRIPTS = (
    (vllm, 2, {"forwards": 700}),
    (sglang, 3, {"forwards": 700, "hidden": 264}),
    (vllm, 4, {"forwards": 500, "layers": 6}),
    (sglang, 2, {"forwards": 60, "hidden": 32, "max_tokens": 512, "layers": 2, "dtype": "fp16"}),
    (vllm, 2, {"forwards": 20, "hidden": 16, "max_tokens": 512, "layers": 1, "dtype": "fp32"}),
    (vllm, 3, {"forwards": 150, "hidden": 264, "max_bytes": 16384 + 3 * 10 * 2 * 528}),  # pieces of ten rows
)


@pytest.mark.parametrize("seed", [20_260_101, FRESH], ids=["fixed", "fresh"])
@pytest.mark.parametrize(("engine", "ranks", "sizes"), SCRIPTS, ids=lambda v: getattr(v, "__name__", None))
def test_serves(
    engine: Callable[[Profile], Script],
    ranks: int,
    sizes: dict[str, Any],
    seed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = engine(Profile(ranks, seed, late=0.002, **sizes))
    figures = total(rank_pool(ranks).run(serve, script, timeout=240))
    with capsys.disabled():
        print(f"\n{script.engine}, {ranks} ranks, seed {seed}: {figures}")
    assert figures["wrong_rows"] == 0
    assert figures["updates"] > 0
    assert figures["reopened"] > 0
    made.setdefault(seed, []).append(figures["calls"])


def test_that_was_enough() -> None:
    """20,000 calls under each seed, if all scripts of it ran."""
    for seed, calls in made.items():
        assert len(calls) < len(SCRIPTS) or sum(calls) >= 20_000, (seed, calls)


@pytest.mark.parametrize("engine", [vllm, sglang])
def test_eager_passes_come_between_captured_sizes_and_beyond(engine: Callable[[Profile], Script]) -> None:
    steps = engine(Profile(2, 1, forwards=200)).steps
    captured = {step.key[1] for step in steps if isinstance(step, Capture) and step.kind != "update"}
    eager = {step.bodies[0].tokens for step in steps if isinstance(step, Forward) and not step.captured}
    assert max(eager) > max(captured)
    assert any(size < max(captured) and size not in captured for size in eager)


# Rules that host replays depend on. Three slots matter in a race that a script only sometimes meets: that control is in
# tests/host/test_host_controls.py. Signatures make ranks meet before they read, so they are off where data is stale.
CONTROLS = {
    "device_epoch": "device_epoch signature",
    "device_dirty": "device_dirty signature",
    "clear": "clear signature",
    "sanitize": "sanitize",
    "integer_compare": "integer_compare",
}


def symptom(rule: str, seed: int) -> str:
    """What goes wrong without `rule`, or "" if nothing does."""
    sizes: dict[str, Any] = {"layers": 2, "max_tokens": 32}
    script = vllm(Profile(2, seed, late=0.002, forwards=150, **sizes))
    pool = rank_pool(2, library=TEST_LIBRARY)
    try:
        figures = total(pool.run(serve, script, CONTROLS.get(rule, ""), timeout=90))
        return f"wrong rows: {figures['wrong_by_form']}" if figures["wrong_rows"] else ""
    except RanksFailed as failed:
        return str(failed)
    finally:
        if rule:
            pool.discard()


@pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")
@pytest.mark.parametrize("rule", list(CONTROLS))
def test_fails_without(rule: str) -> None:
    """Rows are wrong or ranks hang. For some rules that takes unlucky timing, hence several seeds."""
    said = next(filter(None, (symptom(rule, seed) for seed in range(5, 11))), "")
    assert any(word in said for word in ("wrong rows", "fault code", "is broken")), said


@pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")
def test_holds_with_all() -> None:
    assert symptom("", 5) == ""
