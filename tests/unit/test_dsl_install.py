"""The DSL's environment is made by one test file, while another one waits for it, and by nobody twice."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common import dsl
from mnnvl_ar.dsl import constants

PYTHON = f"#!/bin/sh\ntest -e {{venv}}/metadata && echo {constants.DSL}\n"


def use(venv: Path, one_at_a_time: bool, found: Any, events: dict[str, Any], comes: str) -> None:
    """As a test file does, where installing takes its time: as with pip, the version is there before the library. In
    the midst of it another one comes, and has time to answer; one that waits for its turn does not."""
    os.environ["CI"] = "true"
    real = subprocess.run

    def run(command: list[Any], **options: Any) -> Any:
        words = [str(word) for word in command]
        if "venv" in words:
            (venv / "bin").mkdir(parents=True, exist_ok=True)
            (venv / "bin" / "python").write_text(PYTHON.format(venv=venv))
            (venv / "bin" / "python").chmod(0o755)
        elif "install" in words:
            with (venv.parent / "installed").open("a") as log:
                log.write("once\n")
            (venv / "metadata").touch()
            events["in the midst"].set()
            events["another comes"].wait(30)
            events["it has answered"].wait(1.0 if one_at_a_time else 30)
            (venv / "library").touch()
        elif words[0] == sys.executable:
            return subprocess.CompletedProcess(command, 1, "", "")  # has no DSL
        else:
            return real(command, **options)
        return None

    dsl.VENV = venv
    dsl.subprocess.run = run  # type: ignore[attr-defined]
    if not one_at_a_time:
        dsl.one_at_a_time = contextlib.nullcontext  # type: ignore[assignment]
        dsl.is_installed = lambda: True
    dsl.python.cache_clear()  # of the process that this one was forked from
    events[comes].set()
    python = dsl.python()
    found.put(python == str(venv / "bin" / "python") and (venv / "library").exists())
    events["it has answered"].set()


def used(folder: Path, one_at_a_time: bool) -> tuple[list[bool], int]:
    """Whether each of two found all of it, of which the second comes in the midst; how often it was installed."""
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    events = {name: context.Event() for name in ("first comes", "in the midst", "another comes", "it has answered")}
    for comes in ("first comes", "another comes"):
        context.Process(target=use, args=(folder / "venv", one_at_a_time, found, events, comes)).start()
        assert events["in the midst"].wait(30)
    answers = [found.get(timeout=60) for _ in range(2)]
    return answers, (folder / "installed").read_text().count("once")


def test_nobody_uses_what_is_half_installed(tmp_path: Path) -> None:
    assert used(tmp_path, True) == ([True, True], 1)


def test_control_a_version_alone_does_not_say_that_all_is_there(tmp_path: Path) -> None:
    answers, _ = used(tmp_path, False)
    assert False in answers


def test_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of CI nobody installs 260 MB unasked."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(dsl, "VENV", tmp_path / "venv")
    monkeypatch.setattr(dsl, "version_of", lambda python: "")
    with pytest.raises(dsl.NoDsl, match="make dsl"):
        dsl.python.__wrapped__()
