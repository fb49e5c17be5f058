"""A server's script of calls with real CUDA graphs: every real row of every replay is compared, bit for bit, on the
device. More than 10,000 replays at each world size, under a fixed seed and under a fresh one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.gpu_ranks import ranks_of
from common.ranks import TEST_LIBRARY
from tools import gpu_record
from tools.replay.controls import Controls
from tools.replay.gpu import serve
from tools.replay.host import total
from tools.replay.script import Profile, sglang, vllm

FRESH = int.from_bytes(os.urandom(4), "little")
SEEDS = pytest.mark.parametrize("seed", [20_260_101, FRESH], ids=["fixed", "fresh"])
ENOUGH = 10_000  # replays

# Both engines' lists, SGLang's prefill up to where it fuses: in full under the fixed seed, up to 128 under the fresh.
SERVERS = (
    (vllm, {"max_tokens": 512, "forwards": 800, "impatient": True}),
    (sglang, {"max_tokens": 2048, "forwards": 650}),
)
SMALL = {"max_tokens": 128}


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Any:
    """Prints a line, captured or not: seeds must be seen."""
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    return lambda line: (reporter.ensure_newline(), reporter.write_line(line))


def served(say: Any, ranks: Any, seed: int, servers: Any, **sizes: Any) -> list[dict[str, Any]]:
    """Runs the servers' scripts, one after another; the figures of each."""
    results = []
    for engine, lists in servers:
        profile = Profile(ranks.world_size, seed, **{**lists, **sizes})
        script = engine(profile)
        figures = total(ranks.run(serve, script, timeout=200))
        say(f"{script.engine} of {ranks.world_size} ranks, seed {seed}: {figures}")
        results.append({"engine": script.engine, "seed": seed, "layers": profile.layers, **figures})
    return results


@SEEDS
@pytest.mark.parametrize("world_size", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (2, 4, 8)])
def test_serves(world_size: int, seed: int, say: Any, request: pytest.FixtureRequest) -> None:
    some = SMALL if seed == FRESH else {}
    results = served(say, ranks_of("real", world_size), seed, SERVERS, hidden=4096, layers=32, **some)
    if file := request.config.getoption("--gpu-record"):
        kind = request.node.callspec.id.rpartition("-")[2]
        gpu_record.merge("replays", f"replay, {world_size} ranks, {kind} seed", {"scripts": results}, Path(file))
    for figures in results:
        assert figures["wrong_rows"] == 0, figures
        assert figures["reopened"] > 0
    assert sum(figures["discarded"] for figures in results) > 0
    assert sum(figures["replays"] for figures in results) >= ENOUGH
    assert sum(figures["updates"] for figures in results) > 0, "cudaGraphExecUpdate was always refused"


@pytest.mark.gpu(2)
def test_serves_80_layers(say: Any) -> None:
    (figures,) = served(
        say, ranks_of("real", 2), 7, [(vllm, {"max_tokens": 64, "forwards": 60})], hidden=8192, layers=80
    )
    assert figures["wrong_rows"] == 0, figures


@pytest.mark.gpu(2)
def test_serves_in_pieces(say: Any) -> None:
    """A workspace in which sixteen rows go at once, by two-shot, and thirty-two by one-shot."""
    sizes = {"hidden": 4096, "layers": 4, "max_bytes": 16384 + 3 * 16 * 2 * 8192}
    servers = [(vllm, {"max_tokens": 256, "forwards": 500}), (sglang, {"max_tokens": 256, "forwards": 500})]
    for figures in served(say, ranks_of("real", 2), 8, servers, **sizes):
        assert figures["wrong_rows"] == 0, figures
        assert figures["replays"] > 500


# Rule -> what is switched off. Signatures make ranks meet before they read, so they are off where data is stale.
CONTROLS = {
    "": "",
    "device_epoch": "device_epoch signature",
    "device_dirty": "device_dirty signature",
    "clear": "clear signature",
    "sanitize": "sanitize",
    "integer_compare": "integer_compare",
}


@pytest.fixture(scope="module")
def controls() -> Iterator[Controls]:
    made = Controls(CONTROLS)
    yield made
    made.close()


@pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")
@pytest.mark.gpu(2)
@pytest.mark.skipif(torch.cuda.device_count() > 2, reason="alike on every machine; runs where there are two GPUs")
@pytest.mark.parametrize("rule", list(CONTROLS), ids=lambda rule: rule or "none")
def test_fails_without(rule: str, controls: Controls) -> None:
    """Each rule switched off is caught by the script; with all of them it passes."""
    said = controls.symptom(rule, CONTROLS[rule])
    assert bool(said) == bool(rule), said
    assert not rule or any(word in said for word in ("wrong rows", "fault code", "is broken")), said
