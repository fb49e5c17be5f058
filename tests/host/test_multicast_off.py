"""No test, and no rank that a test starts, may create NVLink multicast: on a shared NVSwitch it harms other users."""

from __future__ import annotations

import os

import pytest

from common.ranks import Rank, rank_pool
from mnnvl_ar.memory import MULTICAST_SWITCHES, multicast_refusal
from tools import sanitize

NOTHING_SET = dict.fromkeys(MULTICAST_SWITCHES, "")

forbidden = pytest.mark.skipif(
    os.environ.get("MNNVL_AR_TEST_MULTICAST") == "1", reason="MNNVL_AR_TEST_MULTICAST=1: multicast is allowed"
)


def told(context: Rank) -> str:
    return multicast_refusal()


@forbidden
def test_this_process_refuses() -> None:
    assert multicast_refusal()
    assert {name: os.environ.get(name) for name in MULTICAST_SWITCHES} == MULTICAST_SWITCHES


@forbidden
@pytest.mark.parametrize("env", [{}, NOTHING_SET], ids=["as started", "nothing set"])
def test_ranks_refuse_whoever_starts_them(env: dict[str, str]) -> None:
    """`make faults` and the soak start ranks too, without pytest's configuration."""
    assert all(rank_pool(2, env=env).run(told))


def test_a_person_may_allow_it() -> None:
    assert rank_pool(2, env={**NOTHING_SET, "MNNVL_AR_TEST_MULTICAST": "1"}).run(told) == ["", ""]


def test_the_sanitizers_processes_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MULTICAST_SWITCHES:
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("MNNVL_AR_TEST_MULTICAST", raising=False)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    monkeypatch.setattr("sys.argv", ["sanitize.py"])
    assert sanitize.main() == 1
    assert multicast_refusal()
