"""The ring's model: what takes seconds to search. All of it: `make model`."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

CHECK = Path(__file__).parents[2] / "model" / "check.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_check", CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check = load()
QUICK = [config for config in check.HOLDS + check.BREAKS if config.seconds <= 1]
needs_tools = pytest.mark.skipif(
    bool(check.missing_tools()), reason=f"the model needs {' and '.join(check.missing_tools())}"
)


@needs_tools
@pytest.mark.parametrize("config", QUICK, ids=lambda config: config.name)
def test_search(config, tmp_path):
    result = check.search(config, tmp_path)
    assert result.good, result.verdict


@needs_tools
def test_a_counterexample_reads_as_steps(tmp_path):
    config = next(config for config in check.BREAKS if config.name == "clear-soon")
    assert check.search(config, tmp_path).good
    steps = check.readable(config, tmp_path)
    assert steps[0].endswith("starts, reads epoch 4 (slot 1), dirty 0")
    assert any("destroys what rank" in step for step in steps)
    assert any("waits for ever" in step for step in steps)


@needs_tools
def test_the_documented_counterexample_is_the_one_that_is_found(tmp_path):
    if "6.5.2" not in check.run(["spin", "-V"], tmp_path):
        pytest.skip("another version of spin may find another counterexample of the same length")
    config = next(config for config in check.BREAKS if config.name == "frozen-slot")
    assert check.search(config, tmp_path).good
    text = (CHECK.parents[1] / "docs" / "counterexample.md").read_text()
    assert text.split("```")[1].strip().splitlines() == check.readable(config, tmp_path)


@needs_tools
def test_a_failure_for_another_reason_is_none(tmp_path):
    config = next(config for config in check.BREAKS if config.name == "clear-soon")
    result = check.search(dataclasses.replace(config, shows="no such step"), tmp_path)
    assert not result.good
    assert "FAILS OTHERWISE" in result.verdict


def test_every_broken_variant_says_what_its_counterexample_shows():
    assert all(config.shows for config in check.BREAKS)


HOLDS, BREAKS = check.HOLDS[0], check.BREAKS[0]


@pytest.mark.parametrize(
    ("config", "output"),
    [
        (HOLDS, "Warning: Search not completed\nState-vector 10 byte, depth reached 9, errors: 0"),
        (HOLDS, "error: max search depth too small\nState-vector 10 byte, depth reached 9, errors: 0"),
        (HOLDS, "pan: out of memory\nState-vector 10 byte, depth reached 9, errors: 0"),
        (HOLDS, "pan:1: assertion violated (x) (at depth 3)\nerrors: 1"),
        (HOLDS, "pan:1: invalid end state (at depth 3)\n(Spin Version)\nerrors: 1"),
        (HOLDS, "Killed"),
        (BREAKS, "State-vector 10 byte, depth reached 9, errors: 0"),
        (BREAKS, "pan:1: invalid end state (at depth 3)\n(Spin Version)\nerrors: 1"),
        (BREAKS, "Killed"),
    ],
)
def test_nothing_but_the_expected_verdict_passes(config, output):
    good, _ = check.judge(config, output)
    assert not good
