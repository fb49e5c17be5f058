"""The demo tells right bits from wrong ones, and does not outlive a rank that fails."""

import os
import subprocess
import sys

import pytest
import torch

from common.cases.demo import check_each_form_is_compared, check_forms_write_where_they_say, check_pieces
from common.cases.rules import RULES
from common.ranks import ROOT, TEST_LIBRARY, rank_pool
from mnnvl_ar import reference
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
