"""What safety costs: that the timing runs; on the host it compares nothing."""

import pytest

from common.ranks import rank_pool
from tools import safety_cost


def test_a_call_takes_time() -> None:
    times = rank_pool(2).run(safety_cost.microseconds_a_call, 1, 64)
    assert all(0.1 < time < 10_000 for time in times), times


def test_a_build_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safety_cost, "ROOT", safety_cost.ROOT / "nowhere")
    monkeypatch.setattr("sys.argv", ["safety_cost.py"])
    assert safety_cost.main() == 1
    assert "not built: mnnvl_ar/_C.so, tests/_C_bare.so" in capsys.readouterr().out
