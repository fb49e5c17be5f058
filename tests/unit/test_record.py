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
    assert lines[1:] == ["  added csrc/new.h", "  changed csrc/protocol/ring.h", "  removed mnnvl_ar/ops.py"]


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
