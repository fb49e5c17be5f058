"""The GPU record says fresh when nothing changed, and stale, with the file's name, when something did."""

import json
from pathlib import Path

import pytest

from gpu import record


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for path in ("csrc/protocol/ring.h", "mnnvl_ar/ops.py", "tests/gpu/test_a.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    files = record.source_files(tmp_path)
    tests = {"2": {"passed": 3, "failed": 0, "skipped": 1}}
    entry = {"digest": record.digest(files), "date": "2026-01-01", "world_sizes": [2], "tests": tests}
    content = {"runs": {"2 x GPU": entry}, "figures": {}, "sources": {record.digest(files): files}}
    (tmp_path / "tests/gpu/record.json").write_text(json.dumps(content))
    return tmp_path


def test_fresh(tree: Path) -> None:
    good, lines = record.check(tree / "tests/gpu/record.json", tree)
    assert good, lines
    assert "fresh: 2 x GPU" in lines[0]


def test_a_change_makes_it_stale_and_is_named(tree: Path) -> None:
    (tree / "csrc/protocol/ring.h").write_text("changed")
    (tree / "mnnvl_ar/ops.py").unlink()
    (tree / "csrc/new.h").write_text("")
    good, lines = record.check(tree / "tests/gpu/record.json", tree)
    assert not good
    assert lines[1:4] == ["  added csrc/new.h", "  changed csrc/protocol/ring.h", "  removed mnnvl_ar/ops.py"]


def test_a_failed_test_is_no_good_record(tree: Path) -> None:
    file = tree / "tests/gpu/record.json"
    file.write_text(file.read_text().replace('"failed": 0', '"failed": 1'))
    assert not record.check(file, tree)[0]


def test_no_record(tmp_path: Path) -> None:
    assert not record.check(tmp_path / "record.json", tmp_path)[0]


def test_figures_keep_runs_and_sources(tree: Path) -> None:
    file = tree / "tests/gpu/record.json"
    record.merge("soak", {"calls": 5}, file)
    content = json.loads(file.read_text())
    assert content["figures"]["soak"]["calls"] == 5
    assert content["runs"].keys() == {"2 x GPU"}
    assert content["sources"].keys() == {content["figures"]["soak"]["digest"], content["runs"]["2 x GPU"]["digest"]}


def part(folder: Path, name: str, hardware: str, passed: int, left_out: str) -> Path:
    """The record of one process, of today's sources."""
    file = folder / f"{name}.json"
    files = record.source_files()
    entry = {"world_sizes": [passed], "tests": {"2": {"passed": passed, "failed": 0, "skipped": 1}}}
    entry |= {"digest": record.digest(files), "date": "2026-01-01", "left_out": dict.fromkeys(left_out, 2)}
    file.write_text(
        json.dumps(
            {
                "runs": {hardware: entry},
                "figures": {name: {"digest": entry["digest"], "date": "2026-01-01"}},
                "sources": {},
            }
        )
    )
    return file


def test_parts_of_one_run_are_put_together(tmp_path: Path) -> None:
    whole = tmp_path / "record.json"
    part(tmp_path, "record", "4 x GPU", 100, "")  # an older run of the same machine is replaced, not added to
    parts = [part(tmp_path, "a", "2 x GPU", 2, "yz"), part(tmp_path, "b", "4 x GPU", 4, "xz")]
    record.join(parts, whole, hardware="4 x GPU")
    content = json.loads(whole.read_text())
    assert content["runs"].keys() == {"4 x GPU"}
    run = content["runs"]["4 x GPU"]
    assert run["tests"] == {"2": {"passed": 6, "failed": 0, "skipped": 2}}
    assert (run["world_sizes"], run["left_out"]) == ([2, 4], {"z": 2})
    assert content["figures"].keys() == {"a", "b", "record"}
    assert not record.check(whole)[0], "z was left out by both"
    record.join([*parts, part(tmp_path, "c", "1 x GPU", 1, "")], whole, hardware="4 x GPU")
    good, lines = record.check(whole)
    assert good, lines
    assert "GPU record: no run of 8 GPUs" in lines


def test_tests_that_need_more_gpus_than_there_are_were_not_left_out(tmp_path: Path) -> None:
    whole = tmp_path / "record.json"
    record.join([part(tmp_path, "a", "1 x GPU", 1, "x")], whole, "1 x GPU", gpus=1)
    assert json.loads(whole.read_text())["runs"]["1 x GPU"]["left_out"] == {}
