"""bench/gb200: every job compiles the peers first, and measures over unicast and multicast."""

import re
import shlex
from pathlib import Path

import pytest

from bench import options


@pytest.mark.parametrize("name", ["two_nodes.sbatch", "nvl72.sbatch", "two_nodes.yaml"])
def test_a_job_warms_the_peers_and_runs_both_ways(root: Path, name: str):
    text = (root / "bench" / "gb200" / name).read_text().replace("$((SLURM_NNODES * 4))", "8").replace("$TPS", "2,4,8")
    words = re.findall(r"^ *(?:torchrun bench/run\.py|bench \d+) (--.*)$", text, re.MULTILINE)
    warm, unicast, multicast = [options.parser().parse_args(shlex.split(line)) for line in words]
    assert warm.warm_peers
    assert warm.multicast
    assert (unicast.multicast, multicast.multicast) == (False, True)
    assert unicast.json.stem == multicast.json.stem + "-unicast"
    assert unicast.tp == multicast.tp == [2, 4, 8]
