"""bench/tune.py: from times to a table, and as a whole on the host."""

import json
import subprocess
import sys
from pathlib import Path

from bench.cells import Cell
from bench.shapes import ONE_SHOT_BYTES, Shape, shapes, table

A, B = Shape("one_shot", 4), Shape("two_shot", 2, batch=4)


def cell(tokens: int, hidden: int = 1024) -> Cell:
    return Cell("fused", 8, tokens, hidden, "bfloat16")


def test_neighbours_share_an_entry_unless_another_shape_is_clearly_quicker():
    best = {
        cell(1): [(3.0, A), (4.0, B)],
        cell(2): [(3.95, B), (4.0, A)],  # noise
        cell(4): [(4.0, B), (6.0, A)],
        cell(1, 2048): [(5.0, B), (5.1, A)],
    }
    entries = table(best)
    chosen = [(e["row_bytes"], e["max_tokens"], e["strategy"], e["us"]) for e in entries]
    assert chosen == [(2048, 2, "one_shot", 4.0), (2048, 4, "two_shot", 4.0), (4096, 1, "two_shot", 5.0)]


def test_shapes_are_all_different_and_fit_the_cell():
    for tokens in (1, 8, 128, 2048):
        tried = list(shapes(cell(tokens, 8192)))
        assert len(set(tried)) == len(tried)
        assert all(shape.batch <= tokens for shape in tried)
        has_one_shot = any(shape.strategy == "one_shot" for shape in tried)
        assert has_one_shot == (cell(tokens, 8192).nbytes <= ONE_SHOT_BYTES)


def test_a_run_on_the_host_keeps_other_group_sizes(root: Path, tmp_path: Path):
    file = tmp_path / "host.json"
    file.write_text('{"machine": "host", "tp": {"4": []}}')
    grid = ["--tp", "2", "--tokens", "1,2", "--hidden", "256", "--rounds", "1", "--processes", "2"]
    command = [sys.executable, str(root / "bench" / "tune.py"), "--device", "cpu", *grid, "--out", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(file.read_text())
    assert list(record["tp"]) == ["2", "4"]
    assert [entry["max_tokens"] for entry in record["tp"]["2"]][-1] == 2
    assert record["tp"]["2"][0]["row_bytes"] == 512
