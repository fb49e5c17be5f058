"""Every source is in a room, every room has its files, and a part rests on those that it should."""

import re
from pathlib import Path

import pytest

from tools import ROOT, sources

GPU_TESTS = sorted(
    str(path.relative_to(ROOT)) for room in ("gpu", "ranks") for path in (ROOT / "tests" / room).glob("test_*.py")
)


def test_every_source_has_a_room() -> None:
    assert sources.without_room() == []


def test_every_pattern_has_files_or_is_to_come() -> None:
    """One that has none any more, or that came, is to be deleted from ROOMS, or from COMING."""
    assert sources.without_files() == sorted(sources.COMING)


@pytest.mark.parametrize("test", GPU_TESTS)
def test_every_gpu_test_belongs_to_a_part(test: str) -> None:
    assert sources.room_of(test) in sources.PARTS


def test_parts_rest_on_rooms_that_there_are() -> None:
    assert {room for rooms in sources.PARTS.values() for room in rooms} | {*sources.PARTS} | {sources.NOTHING} == {
        *sources.ROOMS
    }


def imported(*folders: str) -> set[str]:
    """The files of ours outside of tests that tests in these folders import, as they say at the top of a line."""
    found = set()
    for path in (each for folder in folders for each in (ROOT / "tests" / folder).rglob("*.py")):
        for module, names in re.findall(
            r"^ *from ((?:bench|tools)[.\w]*) import ([\w, ]+)", path.read_text(), re.MULTILINE
        ):
            for name in ["", *names.split(", ")]:
                file = Path(*module.split("."), name).with_suffix(".py")
                found |= {str(file)} if (ROOT / file).is_file() else set()
    return found


def test_what_gpu_tests_import_makes_them_stale() -> None:
    files = imported("gpu", "ranks", "common")
    assert "bench/peers/vllm_quantised.py" in files
    assert [file for file in sorted(files) if sources.room_of(file) is None] == []


def test_what_exhaustive_includes_is_arithmetic() -> None:
    """Or of what quantises: else a change of it would leave the figures of all words fresh."""
    included = re.findall(r'#include "(.*)"', (ROOT / "tests/native/exhaustive.cu").read_text())
    assert included
    assert {sources.room_of(f"csrc/{name}") for name in included} == {"arithmetic", "quantised"}


def tree(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)
    return folder


@pytest.mark.parametrize("path", ["csrc/new/a.cu", "mnnvl_ar/new.py", "mnnvl_ar/new/a.py", "tools/new.py"])
def test_a_source_without_a_room_is_named(tmp_path: Path, path: str) -> None:
    root = tree(tmp_path, path, "csrc/protocol/ring.h", "mnnvl_ar/_C.so", "mnnvl_ar/__pycache__/new.pyc", "bench/a.py")
    assert sources.without_room(root) == [path]


def test_a_pattern_without_files_is_named(tmp_path: Path) -> None:
    found = sources.without_files(tree(tmp_path, "csrc/protocol/numerics.h", "setup.py"))
    assert "csrc/torch/" in found
    assert not {"csrc/protocol/numerics*", "setup.py"} & {*found}


SOFTWARE = ("software multicast", "software multicast on GPUs")
# File -> the parts that rest on it. There need not be such a file: some are in rooms that are to come (COMING).
RESTING = {
    "csrc/protocol/numerics.h": {*sources.PARTS},
    "csrc/kernels/ptx.cuh": {*sources.PARTS},
    "csrc/protocol/ring.h": {*sources.PARTS},
    "csrc/kernels/one_shot.cuh": {*sources.PARTS},
    "csrc/epilogues/rms_norm.cu": {*sources.PARTS},
    "csrc/launch/launch.cu": {*sources.PARTS},
    "csrc/torch/run.cpp": {*sources.PARTS},
    "mnnvl_ar/tuning/h200.json": {*sources.PARTS},
    "csrc/diagnosis/evidence.cpp": {*SOFTWARE, "workspaces", "faults", "twin"},
    "mnnvl_ar/memory/vote.py": {SOFTWARE[1], "workspaces", "faults", "twin"},
    "tests/common/cases/calls.py": {*sources.PARTS},
    "tests/common/cases/lifecycle.py": {"bits", *SOFTWARE, "workspaces", "twin"},
    "tests/common/cases/rules.py": {*sources.PARTS},
    "tests/common/cases/asleep.py": {"workspaces"},
    "tests/gpu/test_gpu_bits.py": {"bits"},
    "tools/replay/script.py": {"replays", SOFTWARE[1]},
    "tools/faults/plan.py": {"faults", "twin"},
    "tools/replay/README.md": set(),
    "csrc/host/one_rank.h": set(),
    "mnnvl_ar/compat/vllm.py": set(),
    "mnnvl_ar/dsl/one_shot.py": {"twin"},
    "mnnvl_ar/doctor/machine.py": set(),
    "docs/protocol.md": set(),
    "bench/plots.py": set(),
    "bench/quantised.py": {"bits", *SOFTWARE, "quantised outputs"},
    "csrc/epilogues/block_scales.h": {"numerics", "bits", *SOFTWARE, "quantised outputs", "workspaces"},
    "tests/common/cases/diagnosis.py": {*SOFTWARE, "workspaces", "twin"},
    "tests/common/cases/own_rows.py": {*SOFTWARE},
    "tests/common/cases/forms.py": {"bits", SOFTWARE[0], "quantised outputs"},
}


@pytest.mark.parametrize("path", RESTING)
def test_what_rests_on_a_file(tmp_path: Path, path: str) -> None:
    files = sources.snapshot(tree(tmp_path, path, "setup.py"))
    assert {part for part in sources.PARTS if path in sources.rests_on(part, files)} == RESTING[path]


def test_a_part_that_is_not_known_rests_on_everything(tmp_path: Path) -> None:
    paths = ["csrc/protocol/ring.h", "mnnvl_ar/memory/vote.py", "tools/faults/plan.py"]
    files = sources.snapshot(tree(tmp_path, *paths, "csrc/host/one_rank.h"))
    assert [*sources.rests_on("all tests", files)] == paths
