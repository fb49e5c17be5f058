"""bench/tune.py: from times to a table, and as a whole on the host."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import tune
from bench.cells import Cell
from bench.shapes import ONE_SHOT_BYTES, Shape, shapes, table
from mnnvl_ar import MnnvlArError, Strategy
from mnnvl_ar.strategy import Entry, Table, files

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
    file.write_text('{"machine": "host", "tp": {"2": {"one_shot_bytes": 5}, "4": {"one_shot_bytes": 9}}}')
    grid = ["--tp", "2", "--tokens", "1,2", "--hidden", "256", "--rounds", "1", "--processes", "2"]
    command = [sys.executable, str(root / "bench" / "tune.py"), "--device", "cpu", *grid, "--out", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(file.read_text())
    assert list(record["tp"]) == ["2", "4"]
    tables = files.read(file)
    assert tables[4] == Table(9, source="host.json")
    assert tables[2].entries[0].row_bytes == 512
    assert tables[2].entries[-1].max_tokens == 2


def test_what_is_written_is_what_is_read(tmp_path: Path):
    best = {cell(1): [(3.0, A)], cell(4): [(4.0, B)], cell(1, 2048): [(5.0, Shape("two_shot", 1, 64, 8, 4))]}
    file = tmp_path / "h200.json"
    tune.write(file, "NVIDIA H200", {"8": table(best)})
    assert files.read(file)[8].entries == (
        Entry(2048, 1, Strategy.ONE_SHOT, cluster=4),
        Entry(2048, 4, Strategy.TWO_SHOT, cluster=2, batch=4),
        Entry(4096, 1, Strategy.TWO_SHOT, cluster=1, max_ctas=64, batch=8, lag=4),
    )
    before = file.read_text()
    tune.write(file, "NVIDIA H200", {})
    assert file.read_text() == before


def test_what_the_library_could_not_read_does_not_replace_what_it_can(tmp_path: Path):
    file = tmp_path / "h200.json"
    tune.write(file, "NVIDIA H200", {"8": table({cell(1): [(3.0, A)]})})
    before = file.read_text()
    with pytest.raises(MnnvlArError, match=r"tp 8, entry 1: got \(2048, 1\), wanted row_bytes, max_tokens beyond"):
        tune.write(file, "NVIDIA H200", {"8": 2 * table({cell(1): [(3.0, A)]})})
    assert file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]
