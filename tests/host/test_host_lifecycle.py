"""Closed and at exit, on the host transport; what holds on GPUs too is in tests/ranks."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from common.cases.lifecycle import check_kept_is_given_back
from common.ranks import RankPool


def test_kept_memory_is_given_back() -> None:
    with RankPool(2) as pool:  # which has no other workspaces
        pool.run(check_kept_is_given_back)


AT_EXIT = """
    import atexit, sys
    import torch, torch.distributed as dist
    import mnnvl_ar

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ws = mnnvl_ar.Workspace(dist.group.WORLD, 4, 64, torch.float32, device="cpu")
    x = torch.ones(2, 64)
    assert torch.equal(mnnvl_ar.ops.all_reduce(x, ws.handle), x)
    dist.destroy_process_group()
    if "closing" in sys.argv:
        atexit.register(ws.close)
"""


@pytest.mark.parametrize("how", ["closing", "leaving"])
def test_exit_after_the_group(how: str) -> None:
    """Closed at exit, or not at all: the process ends quietly."""
    command = [sys.executable, "-c", textwrap.dedent(AT_EXIT), how]
    got = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2])
    assert (got.returncode, got.stderr) == (0, "")
