"""bench/report.py --predicted: what a rack has measured beside what was predicted, on made-up records."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench import against, expected, report
from bench.gb200 import record

TOKENS = (1, 2, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1024)
Row = dict[str, Any]


def row(strategy: str, tp: int, tokens: int, us: float, transport: str = "multicast") -> Row:
    own = {"variant": f"mnnvl_ar/{strategy}", "strategy": strategy, "pdl": "auto", "transport": transport}
    cell = {"op": "fused", "tp": tp, "tokens": tokens, "hidden": 7168, "dtype": "bfloat16", "mode": "graph"}
    cell |= {"l2": "warm", "context": "chain", "skew_us": 0.0}
    return {"part": transport, **cell, **own, "p50_us": us, "p99_us": us, "floor_us": 1.0, "ok": True}


def rows(case: expected.Case = expected.LIKELY) -> list[Row]:
    """What a machine would measure that is as `case` says: by unicast a little less at small sizes, more at large."""
    found = []
    for tp in expected.TPS:
        for tokens in TOKENS:
            for strategy in against.STRATEGIES:
                us = getattr(case, f"{strategy}_us")(tokens, tp)
                found += [row(strategy, tp, tokens, us), row(strategy, tp, tokens, us - 0.2, "unicast")]
            found.append({**row("", tp, tokens, 20.0 + tokens), "variant": "nccl"})
    return found


def made(measured: list[Row], **more: Any) -> dict[str, Any]:
    about = {"made_by": record.MADE_BY, "machine": "72 x NVIDIA GB200", "nodes": {str(i): {} for i in range(18)}}
    about |= {"began": "2027-01-01 00:00:00", "status": 0, "trouble": None}
    return {**about, "parts": [{"name": "multicast", "status": "done", "why": ""}], "rows": measured, **more}


def told(measured: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str], **more: Any) -> tuple[int, str]:
    """Exit status and what is printed."""
    file = tmp_path / "results.json"
    file.write_text(json.dumps(made(measured, **more)))
    status = report.main(["--predicted", str(file)])
    return status, capsys.readouterr().out


def line(text: str, beginning: str) -> str:
    found = [line for line in text.splitlines() if line.split()[:3] == beginning.split()]
    assert len(found) == 1
    return found[0]


def test_a_machine_as_predicted_is_inside_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status, text = told(rows(), tmp_path, capsys)
    assert status == 0
    assert "OUTSIDE" not in text
    assert "REFUTED" not in text
    assert "not measured" not in text
    assert text.count("  inside") == 5 * len(TOKENS) * 2 + len(expected.falsifiers()) + 2
    likely = expected.LIKELY.one_shot_us(1, 72)
    assert f"{likely:.1f} ({expected.LOW.one_shot_us(1, 72):.1f} to" in line(text, "72 1 one-shot")
    assert f" {likely:.2f}  inside" in line(text, "72 1 one-shot")
    assert line(text, "72 1 one-shot").endswith(f"{likely - 0.2:.2f}  nccl 21.0")


@pytest.mark.parametrize("case", [expected.LOW, expected.HIGH])
def test_the_ends_of_the_ranges_are_inside(case: expected.Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cells = [line for line in told(rows(case), tmp_path, capsys)[1].splitlines() if "-shot " in line[:20]]
    assert len(cells) == 5 * len(TOKENS) * 2
    assert all("inside" in line for line in cells)


def test_one_cell_outside_is_told_with_what_is_wrong_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    slow = rows()
    place = {"variant": "mnnvl_ar/one_shot", "tp": 8, "tokens": 1, "part": "multicast"}
    (cell,) = [each for each in slow if each.items() >= place.items()]
    cell["p50_us"] = 5.0
    status, text = told(slow, tmp_path, capsys)
    assert status == 0  # a finding, not an error
    assert "5.00  OUTSIDE, ABOVE" in line(text, "8 1 one-shot")
    outside = [line for line in text.splitlines() if "OUTSIDE" in line]
    assert len(outside) == 4
    assert "one-shot at T=1, TP8, us: 5 (" in outside[1]
    assert outside[1].endswith("; then wrong is: gap, send, tail or the multicast's hop")
    assert all("OUTSIDE, BELOW" in line for line in outside[2:])  # two-shot less one-shot, and where it takes over
    refuted = [line for line in text.splitlines() if "REFUTED" in line]
    assert len(refuted) == 1
    assert refuted[0].endswith("one-shot TP8 T=1")  # slower than by unicast


def test_cells_that_were_not_measured_refute_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    few = [r for r in rows() if r["tp"] == 8 and r["part"] == "multicast"]
    status, text = told(few, tmp_path, capsys)
    assert status == 0
    assert "not measured" in line(text, "72 1 one-shot")
    assert "inside" in line(text, "8 1 one-shot")
    falsified = text.split("Predictions that")[1]
    assert falsified.count("not measured") == 3 + 1  # TP72's, and unicast beside
    assert falsified.count("  inside") == 4 + 1
    nothing = told([], tmp_path, capsys, machine="", status=1, trouble="check: no")[1]
    assert nothing.split("Predictions that")[1].count("not measured") == len(expected.falsifiers()) + 2
    assert "INCOMPLETE: check: no" in nothing


def test_only_what_is_predicted_is_compared():
    assert against.is_predicted(row("one_shot", 8, 1, 3.0))
    others = {"mode": "eager", "context": "gemm", "dtype": "float16", "hidden": 2880, "op": "plain", "ok": False}
    others |= {"skew_us": 2.0, "l2": "cold", "strategy": "auto", "pdl": "off", "variant": "nccl"}
    for name, value in others.items():
        assert not against.is_predicted({**row("one_shot", 8, 1, 3.0), name: value}), name


def test_a_wrong_bit_and_a_run_cut_short_are_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wrong = rows()
    wrong[0] |= {"ok": False, "error": "rank 5: out: other bits than the reference"}
    status, text = told(wrong, tmp_path, capsys)
    assert status == 1
    assert "REFUTED        any wrong bit: in 1 of" in text
    assert "rank 5: out: other bits" in text
    assert "not measured" in line(text, "4 1 one-shot")  # its time is none
    assert told(rows(), tmp_path, capsys, status=1, trouble="multicast: rank 3 was killed")[0] == 1
    assert told(rows(), tmp_path, capsys)[0] == 0


def test_what_is_no_record_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a").write_text("{}")
    assert report.main(["--predicted", str(tmp_path / "a")]) == 2
    assert "not a record" in capsys.readouterr().err


def test_the_crossover_is_between_the_sizes_where_the_lines_cross():
    def crossing(late: dict[int, float]) -> float:
        found = [row("one_shot", 8, tokens, 10.0 + us) for tokens, us in late.items()]
        found += [row("two_shot", 8, tokens, 10.0) for tokens in late]
        return against.Measured(found, "multicast").crossover_bytes(8) / 14336

    assert crossing({4: -1.0, 8: 3.0}) == pytest.approx(5.0)
    assert crossing({1: -2.0, 4: -1.0, 8: 1.0, 16: -1.0}) == pytest.approx(6.0)
    assert math.isnan(crossing({4: -1.0, 8: -3.0}))
    assert crossing({1: -2.0, 64: -3.0}) == pytest.approx(64.0)  # and more
    assert crossing({4: 1.0}) == 0.0
    assert math.isnan(crossing({}))
