"""The fault matrix as a program; what it finds is `make faults`."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

RUN = Path(__file__).parents[1] / "faults" / "run.py"


def test_an_interrupted_run_tells_what_it_has_injected(tmp_path: Path) -> None:
    """As a GPU campaign does that is out of time."""
    record = tmp_path / "record.json"
    command = [sys.executable, str(RUN), "--faults", "900", "--groups", "1", "--ranks", "2", "--kinds", "exception"]
    with subprocess.Popen(
        [*command, "--deadline", "0.2", "--record", str(record)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        time.sleep(20.0)  # it imports PyTorch, and so does what it forks its ranks from
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate(timeout=40)
    assert running.returncode == 1, said
    (figures,) = json.loads(record.read_text())["figures"].values()
    assert 0 < figures["injected"] < 900
    assert f"faults: {figures['injected']} injected" in said
