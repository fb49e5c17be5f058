""".ci/run, with a `make` that only says what it was asked for: it goes on after a failure and tells all of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from common.processes import command_lines

ROOT = Path(__file__).parents[2]
MAKE = """#!/bin/bash
for word in "$@"; do case $word in -*|*=*) ;; *) target=$word; break ;; esac; done
for line in 1 2 3 4 5; do echo "$target line $line"; sleep 0.04; done
if [ "$target" = "$KILLS" ]; then kill -KILL $PPID; fi
if [ "$target" = model ]; then sleep "${MODEL_SECONDS:-0}"; fi
if [ "$target" = model ] && [ "$MODEL_AFTER" ]; then
  until [ -e "$TMPDIR"/tmp.*/"$MODEL_AFTER".ended ]; do sleep 0.05; done
fi
if [ "$target" = "$PATIENT" ]; then until [ -e "$TMPDIR"/tmp.*/model.ended ]; do sleep 0.05; done; fi
[[ " $FAILING " != *" $target "* ]]
"""
STEPS = ("lint", "site", "build", "test", "model", "faults")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A clone with nothing in it but .ci/run, and tools that do nothing."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "bin").mkdir()
    for name, text in (("make", MAKE), ("spin", "#!/bin/sh\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def start(place: Path, **variables: str) -> subprocess.Popen[str]:
    env = {
        **os.environ,
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "FAILING": "",
        "PATIENT": "",
        "KILLS": "",
        "MODEL_AFTER": "",
        **variables,
    }
    env["TMPDIR"] = str(place)
    run = [str(place / ".ci/run")]
    return subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def ci(place: Path, **variables: str) -> tuple[int, str]:
    with start(place, **variables) as process:
        text, _ = process.communicate(timeout=60)
    return process.returncode, text


def test_all_is_well(place: Path) -> None:
    status, text = ci(place)
    assert status == 0, text
    assert "failed" not in text
    table = text.split("==== times\n")[1]
    assert sorted(re.findall(r"^ +\d+ s  (.+)$", table, re.MULTILINE)) == sorted([*STEPS, "in all"])
    assert not [*place.glob("tmp.*")], "logs are left"


@pytest.mark.parametrize("failing", [*STEPS, "lint faults"])
def test_it_goes_on_after_a_failure(place: Path, failing: str) -> None:
    status, text = ci(place, FAILING=failing)
    assert status == 1
    (line,) = re.findall(r"^failed: (.*)$", text, re.MULTILINE)
    assert sorted(line.split()) == sorted(failing.split())
    for step in STEPS:
        assert f"{step} line 5" in text, f"{step} was left out"
        assert re.search(rf"^==== {step}: \d+ s, exit status {int(step in failing.split())}$", text, re.MULTILINE)


def test_a_stale_record_is_a_warning(place: Path) -> None:
    status, text = ci(place, FAILING="record-check")
    assert status == 0
    assert "WARNING: the GPU record is stale" in text


def test_logs_do_not_mix(place: Path) -> None:
    """Each step's five lines stand together, whatever ran beside it."""
    _, text = ci(place, MODEL_SECONDS="1.5")
    told = re.findall(r"^(\w+) line (\d)$", text, re.MULTILINE)
    lines = [name for name, _ in told if name in STEPS]
    assert len(lines) == 5 * len(STEPS)
    for first in range(0, len(lines), 5):
        assert len(set(lines[first : first + 5])) == 1, lines


def test_the_model_runs_beside_the_others(place: Path) -> None:
    """It is told where it ends: behind the tests, if it takes longer."""
    _, text = ci(place, MODEL_AFTER="test")
    assert text.index("==== model: begins") < text.index("lint line 1")
    assert text.index("test line 5") < text.index("model line 1")
    _, text = ci(place, PATIENT="lint")
    assert text.index("lint line 5") < text.index("model line 1") < text.index("site line 1")


def test_a_step_that_was_killed_has_failed(place: Path) -> None:
    """With the shell that would have told how it ended."""
    status, text = ci(place, KILLS="faults")
    assert status == 1
    assert "\nfailed: faults\n" in text
    assert "faults line 5" in text


def running(command: str) -> bool:
    return command in command_lines()


def test_ended_from_outside_it_tells_what_was_logged_and_leaves_nothing(place: Path) -> None:
    seconds = f"30.{os.getpid()}"
    with start(place, MODEL_SECONDS=seconds) as process:
        while "line 5" not in "".join(log.read_text() for log in place.glob("tmp.*/model.log")):
            time.sleep(0.05)
        until = time.monotonic() + 20
        while not running(f"sleep {seconds}") and time.monotonic() < until:
            time.sleep(0.05)
        assert running(f"sleep {seconds}")
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    until = time.monotonic() + 20
    assert "model line 5" in text
    assert "==== model: ? s, exit status ?" in text
    while running(f"sleep {seconds}"):
        assert time.monotonic() < until, "what ran beside is left behind"
        time.sleep(0.05)


def test_the_files_that_come_first_are_there() -> None:
    listed = (ROOT / "tests/conftest.py").read_text().split("LONGEST = (", 1)[1].split("\n)", 1)[0]
    names = re.findall(r'"(.+)"', listed)
    assert len(names) > 10
    assert [name for name in names if not (ROOT / "tests" / name).exists()] == []


def unnamed(text: str) -> list[str]:
    """Files with tests that only `make nightly` runs, and that `text` does not name."""
    marked = [path for path in (ROOT / "tests").glob("*/test_*.py") if "\n@pytest.mark.exhaustive" in path.read_text()]
    assert marked
    return [name for path in marked if (name := str(path.relative_to(ROOT))) not in text]


def test_contributing_names_what_is_left_to_the_night() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert unnamed(text) == []
    assert unnamed(text.replace("tests/unit/test_root.py", "")) == ["tests/unit/test_root.py"]


def of_one_name(folder: Path) -> list[str]:
    """Names that several files of tests have: ranks import a test's file by its name, and would find the other one. But
    for folders that are packages."""
    names = [path.name for path in folder.rglob("test_*.py") if not (path.parent / "__init__.py").exists()]
    return sorted({name for name in names if names.count(name) > 1})


def test_no_two_files_of_tests_have_one_name(tmp_path: Path) -> None:
    assert of_one_name(ROOT / "tests") == []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test_a.py").touch()
    assert of_one_name(tmp_path) == ["test_a.py"]
