"""Some of the matrix of faults (tools/faults), and that it sees what it is for."""

import re
import subprocess
import sys

import pytest

from common.ranks import ROOT, TEST_LIBRARY


def matrix(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tools.faults.run", "--groups", "3", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_some_of_the_matrix() -> None:
    got = matrix("--faults", "63", "--seed", "5", "--deadline", "2")  # which a busy machine keeps, as in .ci/run
    assert "faults: 63 injected, 63 named, 0 hung, 0 wrong bits" in got.stdout, got.stdout
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
