"""The fault matrix as a program; what it finds is `make faults`."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tools.faults import run

ROOT = Path(__file__).parents[2]
# `python -m tools.faults.run`, which says so when a fault has been injected.
PROGRAM = """
import sys
from tools.faults import run

class Tally(run.Tally):
    def add(self, *what):
        super().add(*what)
        print("one more", flush=True)

run.Tally = Tally
sys.exit(run.main())
"""


def test_an_interrupted_run_tells_what_it_has_injected(tmp_path: Path) -> None:
    """As a GPU campaign does that is out of time."""
    record = tmp_path / "record.json"
    command = [sys.executable, "-c", PROGRAM, "--faults", "900", "--groups", "1", "--ranks", "2"]
    with subprocess.Popen(
        [*command, "--kinds", "exception", "--deadline", "0.2", "--record", str(record)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    ) as running:
        assert running.stdout is not None
        before = []
        for line in running.stdout:  # to its end, should it end without
            before.append(line)
            if line == "one more\n":
                break
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate(timeout=120)
        said = "".join([*before, said])
    assert running.returncode == 1, said
    (figures,) = json.loads(record.read_text())["figures"].values()
    assert 0 < figures["injected"] < 900
    assert f"faults: {figures['injected']} injected" in said


def test_a_run_whose_groups_end_has_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing injected is nothing named: that alone would pass."""
    monkeypatch.setattr(run, "serve", mock.Mock(side_effect=OSError("no room for a rank")))
    monkeypatch.setattr(sys, "argv", ["run", "--faults", "3", "--groups", "1", "--ranks", "2"])
    before = signal.getsignal(signal.SIGINT)
    try:
        assert run.main() == 1
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr()
    assert "ended before their faults were injected, first by OSError('no room for a rank')" in said.out
    assert "0 injected, 0 named" in said.out
