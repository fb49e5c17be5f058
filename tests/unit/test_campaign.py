"""The GPU campaign's scheduling, with stand-ins for jobs and GPUs."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tools import gpu_campaign as campaign
from tools import gpu_record, sources
from tools.gpu_campaign import Job

# Writes which GPUs it saw, when it began and ended. `beside`: a job that has to begin before it ends.
WORK = """
import json, os, sys, time
began = time.monotonic()
open(sys.argv[1] + ".began", "w").close()
while {beside!r} and not os.path.exists(os.path.join(os.path.dirname(sys.argv[1]), {beside!r} + ".json.began")):
    time.sleep(0.05)
time.sleep({seconds})
content = [os.environ["CUDA_VISIBLE_DEVICES"].split(","), began, time.monotonic()]
open(sys.argv[1], "w").write(json.dumps(content))
print("done"); sys.exit({status})
"""


def job(name: str, gpus: int, seconds: float = 0.2, status: int = 0, limit: float = 20.0, beside: str = "") -> Job:
    work = WORK.format(seconds=seconds, status=status, beside=beside)
    return Job(name, gpus, limit, (sys.executable, "-c", work))


def ignore(_: Path) -> None: ...


def test_each_job_has_its_gpus_to_itself(tmp_path: Path) -> None:
    ended: list[Path] = []
    jobs = [
        job("four", 4),
        job("two a", 2, limit=60.0, beside="two-b"),
        job("two b", 2),
        *(job(f"one {n}", 1) for n in range(5)),
    ]
    assert campaign.run(jobs, ["0", "1", "2", "5"], 60.0, tmp_path, tmp_path, ended.append) == []
    ran = [(each.gpus, *json.loads((tmp_path / f"{each.name.replace(' ', '-')}.json").read_text())) for each in jobs]
    for n, (count, gpus, began, end) in enumerate(ran):
        assert len(set(gpus)) == count
        for _, others, from_, to in ran[:n]:
            assert not {*gpus} & {*others} or began >= to or end <= from_
    assert {path.name for path in ended} == {path.name for path in tmp_path.glob("*.json")}
    (_, _, _, to), (_, _, also_from, _) = ran[1:3]
    assert also_from < to, "two pairs of four GPUs work side by side: or the first would have waited for its limit"


def test_failures_and_limits_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    bad = campaign.run(
        [job("bad", 1, status=3), job("slow", 1, 300, limit=1.0)], ["0"], 60.0, tmp_path, tmp_path, ignore
    )
    assert [each.name for each in bad] == ["bad", "slow"]
    said = capsys.readouterr().out
    assert "bad: FAILED (exit 3)" in said
    assert "slow: interrupted after 1 s" in said
    assert time.monotonic() - began < 60


def test_what_there_is_no_time_for_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = campaign.run([job("first", 1, 5), job("second", 1)], ["0"], 1.0, tmp_path, tmp_path, ignore)
    assert [each.name for each in bad] == ["second", "first"]
    assert "second: NOT RUN, no time" in capsys.readouterr().out


@pytest.mark.parametrize("here", [1, 2, 4, 8])
def test_every_world_size_that_fits_is_asked_for(here: int) -> None:
    """By tests, and by faults; the soak takes all GPUs."""
    names = [each.name for each in campaign.jobs(here)]
    for n in (2, 4, 8):
        assert (f"tests of {n}" in names) == (f"faults of {n}" in names) == (n <= here)
    assert [name for name in names if "soak" in name] == ([f"soak of {here}"] if here > 1 else [])
    assert all(each.gpus <= here for each in campaign.jobs(here))
    assert not list(campaign.jobs(0))


def marked(root: Path) -> set[str]:
    """Folders of tests with some that need a GPU."""
    return {
        str(file.parent.relative_to(root))
        for file in (root / "tests").glob("*/test_*.py")
        if re.search(r"mark\.gpu\b|needs_gpus", file.read_text()) and file.parent.name != "unit"
    }


def test_every_folder_with_gpu_tests_is_asked_for() -> None:
    assert marked(campaign.ROOT) <= {*campaign.CASES, *campaign.PROGRAMS}
    for gpus in (1, 2):
        asked = {word for each in campaign.jobs(2) if each.gpus == gpus for word in each.command}
        assert {*campaign.CASES, *campaign.PROGRAMS} <= asked


def test_a_folder_that_nobody_asks_for_is_found(tmp_path: Path) -> None:
    (tmp_path / "tests" / "new").mkdir(parents=True)
    (tmp_path / "tests" / "new" / "test_a.py").write_text("@pytest.mark.gpu(2)\ndef test_a(): ...\n")
    assert marked(tmp_path) == {"tests/new"}


def names_and_files(gpus: int, fresh: set[str]) -> dict[str, set[str]]:
    """Jobs by name; of tests, the files they are given."""
    jobs = campaign.jobs(gpus, campaign.Choice("GPU", fresh))
    return {each.name: {word for word in each.command if word.startswith("tests/")} for each in jobs}


OTHERS = ("programs", "ranks that share it")  # jobs of tests that lie outside of tests/gpu and tests/ranks
EVERY = {f"{gpus} x GPU: {part}" for gpus in (1, 2) for part in (*sources.PARTS, "other tests")}


def test_of_what_is_fresh_nothing_is_run_again() -> None:
    figures = {"soak, 2 ranks", "cost of safety, 2 ranks", "compute-sanitizer clean", "faults, cuda, 2 ranks"}
    figures |= {"twin beside the library, 2 virtual ranks", "faults, cuda, 2 ranks on one GPU"}
    assert names_and_files(2, EVERY | figures) == {}
    assert {*names_and_files(2, EVERY)} == {
        "soak of 2", "cost of safety of 2", "sanitizers", "the twin's times", "faults of 2", "faults on one GPU"
    }  # fmt: skip
    for gpus in (1, 2):
        asked = names_and_files(2, (EVERY | figures) - {f"{gpus} x GPU: workspaces"})
        every = {name for name in names_and_files(2, figures) if "tests" in name and not name.endswith(OTHERS)}
        assert {*asked} == {name for name in every if f"of {gpus}" in name}
        for files in asked.values():
            assert {gpu_record.part_of(file) for file in files} == {"workspaces"}
            assert "tests/gpu/test_gpu_lifecycle.py" in files
    other = names_and_files(2, (EVERY | figures) - {"1 x GPU: other tests", "2 x GPU: other tests"})
    assert {*other} == {"tests of 2, programs", "tests of 1, programs", "tests of 1, ranks that share it"}


def test_a_record_of_other_gpus_leaves_nothing_out() -> None:
    other = {key.replace("GPU", "other GPU") for key in EVERY}
    assert {*names_and_files(2, other)} == {each.name for each in campaign.jobs(2)}


@pytest.mark.parametrize("is_part", [True, False])
def test_without_tests_only_a_part_has_passed(tmp_path: Path, is_part: bool) -> None:
    empty = replace(job("empty", 1, status=campaign.NO_TESTS), is_part=is_part)
    bad = campaign.run([empty, job("bad", 1, status=1)], ["0"], 60.0, tmp_path, tmp_path, ignore)
    assert [each.name for each in bad] == (["bad"] if is_part else ["empty", "bad"])
