"""Faults are named on every rank; the matrix of all kinds is tools/faults."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.cases.diagnosis import check_absent, check_different, check_marked, check_monitor, check_overwritten
from common.ranks import TEST_LIBRARY, RankPool, rank_pool

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(("ranks", "absent"), [(2, 0), (3, 2), (4, 1)])
def test_absent_rank(ranks: int, absent: int) -> None:
    rank_pool(ranks).run(check_absent, absent)


@pytest.mark.parametrize(("ranks", "odd"), [(2, 0), (3, 0), (4, 3)])
def test_other_call(ranks: int, odd: int) -> None:
    rank_pool(ranks).run(check_different, odd)


@pytest.mark.parametrize("offset", [28, 1020, 5000, 8188, 16380])
def test_overwritten_control_words(offset: int) -> None:
    rank_pool(2).run(check_overwritten, offset)


@pytest.mark.parametrize("watched", [True, False])
def test_monitor(watched: bool) -> None:
    with RankPool(2) as pool:  # whose monitor's thread has to end with this test's workspace
        pool.run(check_monitor, watched)


def test_marked_by_the_rank_at_fault() -> None:
    rank_pool(2).run(check_marked)


def matrix(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(TESTS / "faults" / "run.py"), "--groups", "3", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_some_of_the_matrix() -> None:
    got = matrix("--faults", "33", "--seed", "5")
    assert "faults: 33 injected, 33 named, 0 hung, 0 wrong bits" in got.stdout, got.stdout
    assert got.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "kinds", "wanted"), [("deadline", "exception", "hung"), ("signature", "wrong op", "named")]
)
def test_matrix_sees_what_it_is_for(rule: str, kinds: str, wanted: str) -> None:
    """With the rule off, ranks hang, or faults go by unnamed."""
    if not TEST_LIBRARY.exists():
        pytest.skip("needs tests/_C_test.so: run `make test-build`")
    options = ("--library", str(TEST_LIBRARY), "--off", rule, "--kinds", kinds, "--faults", "3", "--patience", "8")
    got = matrix(*options, "--ranks", "2")
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (\w+)", got.stdout.splitlines()[-1])}
    assert got.returncode == 1, got.stdout
    assert counts["named"] < 3
    assert wanted == "named" or counts[wanted] > 0, got.stdout
