"""bench/cpu_cost.py: a cost is a ratio to torch.add of the same repeat; the whole of it on the host."""

import json
import subprocess
import sys
from pathlib import Path

from bench import cpu_cost


def test_a_ratio_is_within_a_repeat_and_the_slowest_rank_counts() -> None:
    drift = [1.0, 2.0, 4.0, 2.0, 1.0, 1.0]  # of the machine
    ranks = [{cpu_cost.ADD: drift, "mnnvl_ar": [slower * us for us in drift]} for slower in (1.5, 3.0)]
    add, ours = cpu_cost.figures(ranks)
    assert (add["variant"], add["over_add"], add["cpu_us"]) == (cpu_cost.ADD, 1.0, 1.0)
    assert (ours["over_add"], ours["over_add_low"], ours["over_add_high"]) == (3.0, 3.0, 3.0)
    assert (ours["cpu_us"], ours["cpu_us_low"], ours["cpu_us_high"]) == (3.0, 3.0, 12.0)
    assert cpu_cost.line(ours).split() == ["mnnvl_ar", "3.00", "[3.00", "12.00]", "us", "3.00", "[3.00", "3.00]x"]


def test_on_the_host(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    command = [sys.executable, str(root / "bench" / "cpu_cost.py"), "--device", "cpu", "--hidden", "256"]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["variant"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == [cpu_cost.ADD, "mnnvl_ar", "mnnvl_ar/out", "mnnvl_ar/bound", "nothing"]
    assert rows[cpu_cost.ADD]["over_add"] == 1
    assert all(row["cpu_us_low"] <= row["cpu_us"] <= row["cpu_us_high"] for row in rows.values())
