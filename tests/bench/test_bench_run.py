"""bench/run.py as a whole, on the host: real processes, our host transport beside gloo."""

import json
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from bench import launch, report, results
from bench.quantised import KINDS


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "bench" / "run.py"), "--device", "cpu", "--rounds", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_a_small_grid_ends_up_in_the_file(root: Path, tmp_path: Path):
    file = tmp_path / "host.json"
    grid = ["--tp", "2", "--tokens", "1,5", "--hidden", "256", "--op", "fused,plain", "--dtype", "bfloat16,float32"]
    done = run(root, *grid, "--strategy", "auto,two_shot", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(file.read_text())
    assert record["source_digest"] == results.source_digest()
    assert len(record["rows"]) == 2 * 2 * 2 * 3
    assert {row["variant"] for row in record["rows"]} == {"mnnvl_ar", "mnnvl_ar/two_shot", "gloo"}
    for row in record["rows"]:
        assert row.keys() >= set(results.KEYS)
        assert row["ok"] is True, row
        assert row["rounds"] == 2
        assert 0 < row["p50_us"] <= row["p99_us"]
        assert row["floor_us"] is None  # of the host
    assert not report.usual(record["rows"])  # eager on the host is nothing to show


def test_a_world_of_one_between_gemms(root: Path, tmp_path: Path):
    file = tmp_path / "host.json"
    grid = ["--tp", "1", "--context", "gemm", "--tokens", "2", "--hidden", "64", "--op", "fused,static_fp8"]
    done = run(root, *grid, "--pdl", "auto,off", "--peers", "yardsticks", "--verbose", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    others = ["yardstick/trivial", "yardstick/copy"]
    assert [row["variant"] for row in rows] == [
        *("mnnvl_ar", "mnnvl_ar/pdl_off", *others),
        *("mnnvl_ar", "mnnvl_ar/with_norm", "mnnvl_ar/pdl_off", "mnnvl_ar/pdl_off/with_norm", *others),
    ]
    for row in rows:
        assert row["ok"] is True, row
        assert (row["context"], row["skew_us"], row["tp"]) == ("gemm", 0, 1)
        assert row["base_us"] > 0
        assert row["low_us"] <= row["p50_us"] <= row["high_us"]
    assert "taken off" in done.stdout


def test_quantised_ops_are_measured_and_checked(root: Path, tmp_path: Path):
    file = tmp_path / "host.json"
    grid = ["--tp", "2", "--tokens", "3", "--hidden", "384", "--op", ",".join(KINDS), "--dtype", "bfloat16"]
    done = run(root, *grid, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["op"], row["variant"]) for row in rows] == [
        (kind, name) for kind in KINDS for name in ("mnnvl_ar", "mnnvl_ar/with_norm")
    ]
    assert all(row["ok"] for row in rows), rows


def test_no_time_means_no_rows_but_a_list_of_what_was_not_run(root: Path, tmp_path: Path):
    file = tmp_path / "host.json"
    done = run(root, "--tp", "2", "--tokens", "1", "--hidden", "256", "--seconds", "0", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(file.read_text())
    assert record["rows"] == []
    assert record.keys() == {"machine", "source_digest", "rows"}
    notes = (tmp_path / "host.skipped.txt").read_text()
    assert notes == "not run for want of time: fused TP2 T=1 H=256 bfloat16 eager\n"


def test_auto_goes_by_the_tables_that_are_given(root: Path, tmp_path: Path):
    (tmp_path / "host.json").write_text('{"machine": "host", "tp": {"2": {"one_shot_bytes": -1}}}')
    grid = ["--tp", "2", "--tokens", "1", "--hidden", "256", "--peers", "", "--json", str(tmp_path / "rows.json")]
    done = run(root, *grid, "--tables", str(tmp_path))
    assert done.returncode == 1
    assert "strategy table host.json" in done.stderr  # it was read, and is none
    assert run(root, *grid).returncode == 0


def test_a_free_port_is_kept_for_the_store_that_is_to_listen_there():
    port = launch.free_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    store = TCPStore("127.0.0.1", port, None, True, timedelta(seconds=5), wait_for_workers=False)
    store.set("a", "b")
    assert store.get("a") == b"b"
