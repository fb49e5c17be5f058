"""The demo tells right bits from wrong ones, and does not outlive a rank that fails."""

import os
import subprocess
import sys

import pytest

from common.cases.rules import RULES
from common.ranks import ROOT, TEST_LIBRARY

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
    assert "[" in done.stderr  # progress


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
