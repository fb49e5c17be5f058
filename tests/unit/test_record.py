"""The GPU record says fresh when nothing changed, and stale, with the file's name, when something did that counts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tools import ROOT, gpu_record, sources

FILES = ("csrc/protocol/ring.h", "csrc/torch/ops.cpp", "mnnvl_ar/ops.py", "mnnvl_ar/memory/vote.py")
FILES += ("mnnvl_ar/dsl/a.py", "tests/gpu/test_gpu_bits.py", "tests/gpu/test_gpu_lifecycle.py", "docs/protocol.md")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A record of two parts, and the sources that it is of."""
    for path in FILES:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    files = sources.snapshot(tmp_path)
    runs = {}
    for part in ("bits", "workspaces"):
        tests = {"passed": 3, "failed": 0, "skipped": 1}
        about = {"hardware": "2 x GPU", "part": part, "digest": sources.digest(files), "date": "2026-01-01"}
        runs[f"2 x GPU: {part}"] = {**about, "gpus": 2, "tests": tests, "left_out": []}
    content = {"runs": runs, "figures": {}, "sources": {sources.digest(files): files}}
    (tmp_path / "record.json").write_text(json.dumps(content))
    return tmp_path


def checked(tree: Path) -> tuple[bool, dict[str, str]]:
    """(fresh?, what is said of each part)."""
    good, lines = gpu_record.check(tree / "record.json", tree)
    parts, part = dict.fromkeys(sources.PARTS, ""), ""
    for line in lines:
        if line.startswith("  "):
            parts[part] += f"\n{line}"
        else:
            part, said = line.removeprefix("GPU record: ").split(": ", 1)
            parts[part] = said
    return good, parts


def test_fresh(tree: Path) -> None:
    good, parts = checked(tree)
    assert good, parts
    assert parts["bits"].startswith("fresh: 2 x GPU")
    assert parts["workspaces"].startswith("fresh: 2 x GPU")


def test_what_need_not_be_made_again(tree: Path) -> None:
    """Whole, without a failure, of today's sources."""
    file = tree / "record.json"
    both = {"2 x GPU: bits", "2 x GPU: workspaces"}
    assert gpu_record.fresh(file, tree) == both
    content = json.loads(file.read_text())
    nothing = {"passed": 0, "failed": 0, "skipped": 4}
    for spoil in ({"left_out": ["tests/gpu/test_gpu_bits.py::test_a"]}, {"failed": True}, {"tests": nothing}):
        spoilt = json.loads(file.read_text())
        spoilt["runs"]["2 x GPU: bits"].update(spoil)
        file.write_text(json.dumps(spoilt))
        assert gpu_record.fresh(file, tree) == both - {"2 x GPU: bits"}
        file.write_text(json.dumps(content))
    (tree / "mnnvl_ar/memory/vote.py").write_text("changed")
    assert gpu_record.fresh(file, tree) == both - {"2 x GPU: workspaces"}


def test_a_change_makes_it_stale_and_is_named(tree: Path) -> None:
    (tree / "csrc/protocol/ring.h").write_text("changed")
    (tree / "mnnvl_ar/ops.py").unlink()
    (tree / "csrc/kernels").mkdir()
    (tree / "csrc/kernels/a.cuh").write_text("")
    good, parts = checked(tree)
    assert not good
    for part in ("bits", "workspaces"):
        state, *changes = parts[part].split("\n")
        assert state.startswith("STALE: 2 x GPU")
        assert changes == ["  added csrc/kernels/a.cuh", "  changed csrc/protocol/ring.h", "  removed mnnvl_ar/ops.py"]


def test_a_change_makes_stale_what_rests_on_it_alone(tree: Path) -> None:
    (tree / "mnnvl_ar/memory/vote.py").write_text("changed")
    good, parts = checked(tree)
    assert not good
    assert parts["bits"].startswith("fresh")
    assert parts["workspaces"].split("\n")[1:] == ["  changed mnnvl_ar/memory/vote.py"]


def test_documents_and_other_front_ends_change_nothing(tree: Path) -> None:
    for path in ("mnnvl_ar/dsl/a.py", "docs/protocol.md", "mnnvl_ar/compat/vllm.py", "bench/run.py"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text("changed")
    assert checked(tree)[0]


def test_sources_that_are_not_known_are_stale(tree: Path) -> None:
    content = json.loads((tree / "record.json").read_text())
    (tree / "record.json").write_text(json.dumps({**content, "sources": {}}))
    good, parts = checked(tree)
    assert not good
    assert parts["bits"].startswith("STALE")


def test_what_nobody_ran_is_not_run_and_no_reason(tree: Path) -> None:
    good, lines = gpu_record.check(tree / "record.json", tree)
    assert good
    assert {"GPU record: replays: not run", "GPU record: faults: not run", "GPU record: not run: 8 GPUs"} <= {*lines}
    assert "GPU record: not run: 2 GPUs" not in lines


def test_a_failed_test_is_no_good_record(tree: Path) -> None:
    file = tree / "record.json"
    file.write_text(file.read_text().replace('"failed": 0', '"failed": 1', 1))
    assert not gpu_record.check(file, tree)[0]


def test_figures_that_are_not_as_they_should_be_are_no_good_record(tree: Path) -> None:
    file = tree / "record.json"
    gpu_record.merge("replays", "soak", {"wrong_rows": 7}, file, good=False)
    good, lines = gpu_record.check(file, tree)
    assert not good
    assert any("soak" in line and line.endswith("FAILED)") for line in lines)
    gpu_record.merge("replays", "soak", {"wrong_rows": 0}, file)
    assert not any("FAILED" in line for line in gpu_record.check(file, tree)[1])


def test_no_record(tmp_path: Path) -> None:
    assert not gpu_record.check(tmp_path / "record.json", tmp_path)[0]


def test_any_python_can_check_the_record_that_is_there() -> None:
    """-S: without any package that is installed."""
    command = [sys.executable, "-S", "-m", "tools.gpu_record", "--check"]
    got = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert got.returncode in (0, 1)
    assert "GPU record: bits: " in got.stdout, got.stderr


def test_figures_keep_runs_and_sources(tree: Path) -> None:
    file = tree / "record.json"
    gpu_record.merge("replays", "soak", {"calls": 5}, file)
    content = json.loads(file.read_text())
    soak = content["figures"]["soak"]
    assert (soak["calls"], soak["part"]) == (5, "replays")
    assert content["runs"].keys() == {"2 x GPU: bits", "2 x GPU: workspaces"}
    assert content["sources"].keys() == {soak["digest"], content["runs"]["2 x GPU: bits"]["digest"]}


def written(folder: Path, here: int, outcomes: dict[str, tuple[int, str]], left_out: dict[str, int]) -> dict[str, Any]:
    file = folder / "record.json"
    seen = mock.patch.object(gpu_record, "_gpus", return_value=(here, "GPU"))
    with seen, mock.patch.object(gpu_record, "_about", return_value={}):
        gpu_record.write_run(file, outcomes, left_out)
    return runs(file)


def test_a_run_is_written_by_part_and_by_what_tests_need(tmp_path: Path) -> None:
    bits, life, odd = (
        "tests/gpu/test_gpu_bits.py::test_a",
        "tests/gpu/test_gpu_lifecycle.py::test_b",
        "tests/x.py::test_c",
    )
    outcomes = {bits: (2, "passed"), bits + "d": (1, "skipped"), life: (2, "failed"), odd: (1, "passed")}
    unseen = {"tests/gpu/test_many_ranks.py": 0, "tests/gpu/test_replay.py": 0}  # one of a part that was run, one not
    found = written(tmp_path, 2, outcomes, {life + "e": 1, **unseen})
    assert {key: (run["tests"], run["left_out"]) for key, run in found.items()} == {
        "2 x GPU: bits": ({"passed": 1, "failed": 0, "skipped": 0}, ["tests/gpu/test_many_ranks.py"]),
        "1 x GPU: bits": ({"passed": 0, "failed": 0, "skipped": 1}, []),
        "2 x GPU: workspaces": ({"passed": 0, "failed": 1, "skipped": 0}, []),
        "1 x GPU: workspaces": ({"passed": 0, "failed": 0, "skipped": 0}, [life + "e"]),
        "1 x GPU: other tests": ({"passed": 1, "failed": 0, "skipped": 0}, []),
    }
    assert {key: f"{run['gpus']} x GPU" for key, run in found.items()} == {key: key[:7] for key in found}


def test_tests_that_need_more_gpus_than_there_are_are_nowhere(tmp_path: Path) -> None:
    test = "tests/gpu/test_gpu_bits.py::test_a"
    found = written(tmp_path, 1, {test: (1, "passed"), test + "b": (2, "skipped")}, {test + "c": 4})
    assert found.keys() == {"1 x GPU: bits"}
    assert found["1 x GPU: bits"]["tests"] == {"passed": 1, "failed": 0, "skipped": 0}


def process(folder: Path, name: str, gpus: int, passed: int, left_out: str, part: str = "bits", of: str = "") -> Path:
    """The record of one process, of today's sources, or of others with the digest `of`."""
    file = folder / f"{name}.json"
    about = {"part": part, "digest": of or sources.digest(sources.snapshot()), "date": "2026-01-01"}
    tests = {"passed": passed, "failed": 0, "skipped": 1}
    run = {**about, "hardware": f"{gpus} x GPU", "gpus": gpus, "tests": tests, "left_out": [*left_out]}
    content = {"runs": {f"{gpus} x GPU: {part}": run}, "figures": {name: about}, "sources": {}}
    file.write_text(json.dumps(content | {"sources": {about["digest"]: sources.snapshot()}}))
    return file


def runs(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())["runs"]
    return found


def passed(file: Path) -> dict[str, int]:
    return {key: run["tests"]["passed"] for key, run in runs(file).items()}


def test_processes_of_one_run_are_put_together(tmp_path: Path) -> None:
    whole = process(tmp_path, "record", 4, 100, "")  # an older run of as many GPUs is replaced, not added to
    parts = [process(tmp_path, "a", 4, 2, "yz"), process(tmp_path, "b", 4, 4, "xz"), process(tmp_path, "c", 1, 7, "")]
    gpu_record.join(parts, whole)
    assert passed(whole) == {"4 x GPU: bits": 6, "1 x GPU: bits": 7}
    run = runs(whole)["4 x GPU: bits"]
    assert (run["tests"]["skipped"], run["left_out"]) == (2, ["z"])
    assert json.loads(whole.read_text())["figures"].keys() == {"a", "b", "c", "record"}
    assert not gpu_record.check(whole)[0], "z was left out by both"
    gpu_record.join([*parts, process(tmp_path, "d", 4, 1, "")], whole)
    good, lines = gpu_record.check(whole)
    assert good, lines
    assert "GPU record: not run: 8 GPUs" in lines


def test_what_was_left_out_altogether_is_told(tmp_path: Path) -> None:
    whole = tmp_path / "record.json"
    gpu_record.join([process(tmp_path, "a", 2, 0, "x")], whole)
    good, lines = gpu_record.check(whole)
    assert not good
    assert any(line.startswith("GPU record: bits: not run: 2 x GPU") for line in lines)


def test_a_run_of_one_part_leaves_the_other_parts_alone(tmp_path: Path) -> None:
    whole = process(tmp_path, "record", 2, 7, "")
    gpu_record.join([process(tmp_path, "a", 2, 0, "x"), process(tmp_path, "b", 2, 5, "", "replays")], whole)
    assert passed(whole) == {"2 x GPU: bits": 7, "2 x GPU: replays": 5}


def test_a_process_that_ran_none_of_a_part_takes_away_nothing(tmp_path: Path) -> None:
    """As of sources that were changed in a place on which this part does not rest."""
    whole, none = tmp_path / "record.json", process(tmp_path, "b", 2, 0, "x", of="0123")
    gpu_record.join([process(tmp_path, "a", 2, 7, ""), none], whole)
    assert passed(whole) == {"2 x GPU: bits": 7}
    gpu_record.join([none, process(tmp_path, "c", 2, 8, "")], whole)
    assert passed(whole) == {"2 x GPU: bits": 8}


def test_what_was_left_out_at_first_may_have_been_skipped_later(tmp_path: Path) -> None:
    """A campaign joins all of its records anew whenever a job ends. No test of the part ran in either."""
    whole = tmp_path / "record.json"
    first, second = process(tmp_path, "a", 2, 0, "x"), process(tmp_path, "b", 2, 0, "")
    gpu_record.join([first], whole)
    gpu_record.join([first, second], whole)
    assert runs(whole)["2 x GPU: bits"]["left_out"] == []


def test_a_run_from_before_there_were_parts_is_replaced(tmp_path: Path) -> None:
    whole = process(tmp_path, "record", 2, 7, "", gpu_record.ALL_TESTS)
    assert gpu_record.check(whole)[0], "it is read as resting on everything"
    gpu_record.join([process(tmp_path, "a", 4, 5, "")], whole)
    assert runs(whole).keys() == {"2 x GPU: all tests", "4 x GPU: bits"}
    gpu_record.join([process(tmp_path, "b", 2, 5, "")], whole)
    assert runs(whole).keys() == {"2 x GPU: bits", "4 x GPU: bits"}


A, B, OTHER = "tests/gpu/test_a.py::test_1", "tests/gpu/test_a.py::test_2", "tests/gpu/test_b.py::test_3"


@pytest.mark.parametrize(
    ("one", "two", "left"),
    [
        ([A, B], [B, OTHER], [B]),
        ([A, B], [], []),
        # A run of other files has left a file out, and with it what the first one left out of it.
        ([A], ["tests/gpu/test_a.py", "tests/gpu/test_b.py"], [A]),
        (["tests/gpu/test_a.py"], ["tests/gpu/test_a.py"], ["tests/gpu/test_a.py"]),
        (["tests/gpu/test_a.py"], [OTHER], []),
    ],
)
def test_what_two_runs_left_out(one: list[str], two: list[str], left: list[str]) -> None:
    assert gpu_record.left_out_of_both(one, two) == gpu_record.left_out_of_both(two, one) == left
