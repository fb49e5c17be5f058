"""bench/tune.py: from times to a table, and as a whole on the host."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import launch, tune
from bench.cells import TOKENS, Cell
from bench.shapes import MAX_CLUSTER, MOST_ROW_WARPS, MOST_WARPS, Shape, clusters, most_one_shot_bytes, shapes, table
from mnnvl_ar import MnnvlArError, Strategy
from mnnvl_ar.tuning import Entry, LaunchShape, Table, files

A = Shape("one_shot", LaunchShape(cluster=4))
B = Shape("two_shot", LaunchShape(cluster=2, batch=4))


def cell(tokens: int, hidden: int = 1024, tp: int = 8) -> Cell:
    return Cell("fused", tp, tokens, hidden, "bfloat16")


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


PROCESSORS = 132


@pytest.mark.parametrize("tp", [2, 8])
@pytest.mark.parametrize("hidden", [2880, 4096, 7168, 8192, 16384])
@pytest.mark.parametrize("tokens", TOKENS)
def test_shapes_are_few_all_different_and_fit_the_cell(tokens: int, hidden: int, tp: int):
    tried = list(shapes(cell(tokens, hidden, tp), PROCESSORS))
    assert len(set(tried)) == len(tried) <= 23
    most = MOST_ROW_WARPS if tp in (2, 4) and tokens <= PROCESSORS else MOST_WARPS
    assert {shape.launch.cluster for shape in tried} <= {0, *clusters(2 * hidden), *clusters(2 * hidden, most)}
    assert all(shape.launch.batch <= tokens for shape in tried)
    assert all((shape.launch.batch, shape.launch.lag) == (0, 0) for shape in tried if shape.strategy == "one_shot")
    small = cell(tokens, hidden, tp).nbytes <= most_one_shot_bytes(tp)
    strategies = ({"two_shot"} if tp > 2 else set()) | ({"one_shot"} if small else set())
    assert {shape.strategy for shape in tried} == strategies
    assert {shape.strategy for shape in tried if shape == Shape(shape.strategy)} == strategies  # the library's own
    assert {shape.strategy for shape in tried if shape.launch.max_ctas == PROCESSORS // 2} == (
        strategies if tokens >= 16 else set()
    )
    assert not any(shape.launch.max_ctas for shape in shapes(cell(tokens, hidden, tp), 0))


def launched(row_bytes: int, cluster: int, most_warps: int) -> tuple[int, int]:
    """CTAs a row and warps with rows a CTA: `plan` of csrc/launch/plan.cpp for a cluster that was asked for."""
    groups = -(-row_bytes // 512)
    narrowest = -(-groups // most_warps)
    warps = -(-groups // max(min(cluster, 8, groups), narrowest))
    return max(-(-groups // warps), narrowest), warps


def test_each_launch_is_tried_once():
    assert clusters(2 * 2880) == [1, 2, 3, 4, 6]
    assert clusters(2 * 4096) == [2, 3, 4, 6, 8]
    assert clusters(2 * 7168) == [2, 3, 4, 5, 6, 7]
    assert clusters(2 * 8192) == [3, 4, 5, 6, 7, 8]
    assert clusters(2 * 4096, MOST_ROW_WARPS) == [1, 2, 3, 4, 6, 8]
    for row_bytes, most in itertools.product(range(16, 32768 + 16, 16), (MOST_WARPS, MOST_ROW_WARPS)):
        found = [launched(row_bytes, cluster, most) for cluster in clusters(row_bytes, most)]
        assert len(set(found)) == len(found) <= 8
        assert set(found) == {launched(row_bytes, cluster, most) for cluster in range(1, 9)}


def test_what_a_launch_can_be_is_what_the_kernels_say(root: Path):
    source = (root / "csrc/launch/limits.h").read_text()
    assert f"kMaxCluster = {MAX_CLUSTER};" in source
    assert f"kMaxThreads = {(MOST_WARPS + 2) * 32};" in source
    assert "kOtherWarps = 2;" in source


def test_a_run_on_the_host_keeps_other_group_sizes(root: Path, tmp_path: Path):
    file = tmp_path / "host.json"
    file.write_text('{"machine": "host", "tp": {"2": {"one_shot_bytes": 5}, "4": {"one_shot_bytes": 9}}}')
    grid = ["--tp", "2", "--tokens", "1,2", "--hidden", "256", "--rounds", "1", "--processes", "2"]
    command = [sys.executable, str(root / "bench" / "tune.py"), "--device", "cpu", *grid, "--out", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(file.read_text())
    assert list(record["tp"]) == ["2", "4"]
    tables = files.read(file)
    assert tables[4] == Table(9, source="host.json")
    assert tables[2].entries[0].row_bytes == 512
    assert tables[2].entries[-1].max_tokens == 2


def test_what_is_written_is_what_is_read(tmp_path: Path):
    all_figures = LaunchShape(cluster=1, max_ctas=64, batch=8, lag=4)
    best = {cell(1): [(3.0, A)], cell(4): [(4.0, B)], cell(1, 2048): [(5.0, Shape("two_shot", all_figures))]}
    file = tmp_path / "h200.json"
    tune.write(file, "NVIDIA H200", {"8": table(best)}, "new")
    assert files.read(file)[8].entries == (
        Entry(2048, 1, Strategy.ONE_SHOT, A.launch),
        Entry(2048, 4, Strategy.TWO_SHOT, B.launch),
        Entry(4096, 1, Strategy.TWO_SHOT, all_figures),
    )
    before = file.read_text()
    tune.write(file, "NVIDIA H200", {}, "new")
    assert file.read_text() == before


def test_what_the_library_could_not_read_does_not_replace_what_it_can(tmp_path: Path):
    file = tmp_path / "h200.json"
    tune.write(file, "NVIDIA H200", {"8": table({cell(1): [(3.0, A)]})}, "new")
    before = file.read_text()
    with pytest.raises(MnnvlArError, match=r"tp 8, entry 1: got \(2048, 1\), wanted row_bytes, max_tokens beyond"):
        tune.write(file, "NVIDIA H200", {"8": 2 * table({cell(1): [(3.0, A)]})}, "new")
    assert file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_row_size_measured_anew_leaves_the_others(tmp_path: Path):
    file = tmp_path / "h200.json"
    tune.write(file, "NVIDIA H200", {"8": table({cell(1, 2048): [(5.0, A)]})}, "old")
    both = {cell(1): [(3.0, A)], cell(4): [(4.0, B)]}
    tune.write(file, "NVIDIA H200", {"8": table(both)}, "new")
    tune.write(file, "NVIDIA H200", {"8": table({cell(2): [(2.0, B)]})}, "new")
    assert files.read(file)[8].entries == (
        Entry(2048, 2, Strategy.TWO_SHOT, B.launch),
        Entry(4096, 1, Strategy.ONE_SHOT, A.launch),
    )
    assert json.loads(file.read_text())["tp"]["8"]["source_digest"] == "old + new"
    tune.write(file, "NVIDIA H200", {"8": table({cell(1, 2048): [(5.0, A)], cell(1): [(5.0, A)]})}, "new")
    assert json.loads(file.read_text())["tp"]["8"]["source_digest"] == "new"


CRASHES = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from bench import tune, tune_group
race = tune_group._race
def crashes(team, cell, *rest):
    return race(team, cell, *rest) if cell.hidden != 768 else sys.exit(9)
tune_group._race = crashes
sys.exit(tune.main())
"""


def test_what_was_measured_before_a_crash_is_in_the_file(root: Path, tmp_path: Path):
    script, file = tmp_path / "tune.py", tmp_path / "host.json"
    script.write_text(CRASHES)
    grid = ["--tp", "2", "--tokens", "1,2", "--hidden", "512,256,768", "--rounds", "1", "--device", "cpu"]
    assert launch.run([str(script), str(root), *grid, "--out", str(file)], 2, deadline=time.monotonic() + 250) == 1
    assert {entry.row_bytes for entry in files.read(file)[2].entries} == {512, 1024}
