"""The demo tells right bits from wrong ones, and does not outlive a rank that fails."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.cases.demo import check_each_form_is_compared, check_forms_write_where_they_say, check_pieces
from common.cases.rules import RULES
from common.ranks import ROOT, TEST_LIBRARY, rank_pool
from mnnvl_ar import reference
from mnnvl_ar.__main__ import main
from mnnvl_ar.demo import show
from mnnvl_ar.demo.rows import hostile_rows

needs_test_build = pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")


def demo(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mnnvl_ar", "demo", "--device", "cpu", "--ranks", "2", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=200, check=False
    )


def without(*rules: str) -> tuple[str, str]:
    return "--broken-rules", str(sum(1 << RULES.index(rule) for rule in rules))


def test_demo_is_bit_exact() -> None:
    done = demo("--calls", "600")
    assert done.returncode == 0, done.stderr
    assert "650 calls on each of 2 ranks: every bit right." in done.stdout
    assert "bit exact" in done.stdout
    assert "host" in done.stdout
    lines = done.stderr.splitlines()  # progress
    assert "making inputs" in lines[0]
    assert lines[-1] == f"[{'#' * 32}] 100%  650 calls, all of their bits compared"
    assert "\r" not in done.stderr


@needs_test_build
def test_demo_sees_a_wrong_bit() -> None:
    """Control: slots are not cleared, and nobody compares signatures."""
    done = demo("--calls", "2000", *without("clear", "signature"), MNNVL_AR_LIBRARY=str(TEST_LIBRARY))
    assert done.returncode == 1, done.stderr
    assert "WRONG, first:" in done.stdout


@needs_test_build
def test_demo_does_not_hang() -> None:
    """Control: sentinels are sent, so ranks wait for what came long ago."""
    done = demo("--deadline", "3", *without("sanitize"), MNNVL_AR_LIBRARY=str(TEST_LIBRARY))
    assert done.returncode == 2, done.stdout
    assert "FAILED: rank" in done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden", [64, 2880, 8192])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_rows_have_norms(ranks: int, hidden: int, dtype: torch.dtype) -> None:
    """Hostile words leave norms to compare: a row's is 0 or NaN throughout if they take its square sum to infinity."""
    *xs, residual = (hostile_rows(8, hidden, dtype, seed=0, rank=rank) for rank in range(ranks + 1))
    norm, _ = reference.all_reduce_rms_norm(xs, residual, torch.ones(hidden), 1e-6)
    numbers = (norm.isfinite() & (norm != 0)).float().mean(-1)
    assert numbers[2:5].min() > 0.5


def test_every_call_of_a_pass_is_compared() -> None:
    rank_pool(2).run(check_each_form_is_compared)


def test_calls_write_where_they_say() -> None:
    rank_pool(2).run(check_forms_write_where_they_say)


def test_graphs_of_pieces() -> None:
    rank_pool(2).run(check_pieces)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--calls", "-5"),
        ("--calls", "0"),
        ("--calls", "many"),
        ("--ranks", "-1"),
        ("--ranks", "0"),
        ("--ranks", "73"),
        ("--seconds", "0"),
        ("--seconds", "nan"),
        ("--deadline", "0"),
        ("--deadline", "inf"),
        ("--seed", "-1"),
    ],
)
def test_bad_arguments_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--device", "cpu", option, value])
    assert ended.value.code == 2
    assert f"argument {option}: is {value}, wanted a number from " in capsys.readouterr().err


def test_too_few_gpus_are_not_a_wrong_bit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "cuda", "--ranks", "72"]) == 2
    assert "72 GPUs are wanted, there are " in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("moment", ["header", "progress"])
def test_demo_can_be_stopped(moment: str, number: int, status: int, tmp_path: Path) -> None:
    """By Ctrl-C, which all processes get, or by a signal to the first: no traceback, no processes, and no files if
    that can be helped."""
    command = [sys.executable, "-m", "mnnvl_ar", "demo", "--device", "cpu", "--ranks", "2"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    log = tmp_path / "log"
    with log.open("w") as to:
        demo = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=to, stderr=to, start_new_session=True, preexec_fn=heed_ctrl_c
        )
    until = time.monotonic() + 150
    while {"header": "Host transport", "progress": "making inputs"}[moment] not in log.read_text():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(demo.pid, number) if number == signal.SIGINT else demo.send_signal(number)
    assert demo.wait(60) == status, log.read_text()
    assert "Traceback" not in log.read_text()
    assert number == signal.SIGKILL or [path.name for path in tmp_path.iterdir()] == ["log"]
    until = time.monotonic() + 60
    while _alive(demo.pid):
        assert time.monotonic() < until, _alive(demo.pid)
        time.sleep(0.05)


def heed_ctrl_c() -> None:
    """What a shell runs in the background ignores it, and so does all that is started from there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _alive(session: int) -> list[str]:
    """Processes of a session that have not ended."""
    listed = subprocess.run(
        ["ps", "-o", "stat=,args=", "-s", str(session)], capture_output=True, text=True, check=False
    )
    return [line for line in listed.stdout.splitlines() if not line.startswith("Z")]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_bar_fits_its_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", str(columns))
    bar = show.Bar()
    bar.show(0.5, 10**9)
    bar.show(1.0, 10**9)
    bar.close()
    _, *shown = sys.stderr.getvalue().split("\r")  # type: ignore[attr-defined]
    assert len(shown) == 2
    assert all(len(line.rstrip("\n")) < columns for line in shown)
    assert shown[1].endswith("\n")
