"""A rank of a server as its own process, for `test_policy`: python -m compat.served RANK SIZE FOLDER

It loads vLLM's plugin as a worker does, makes a workspace, and calls for ever. After each call that returned it writes
the call's number to FOLDER/RANK.calls, and "raised" if one raised. Then, or after LAST calls, it stays alive until
FOLDER/over is there. Environment: SERVES=1, policy.serving() was said; LAST; NAP, seconds that rank 1 sleeps before its
fifth call.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import mnnvl_ar_plugins
from compat.stand_in import standing_in
from mnnvl_ar.compat import policy


def main(rank: int, size: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    with standing_in("0.6.14") as comm, (folder / f"{rank}.calls").open("w", buffering=1) as calls:
        mnnvl_ar_plugins.vllm()
        workspace = comm.create_allreduce_fusion_workspace(
            "mnnvl", size, rank, 16, 64, torch.float32, group=dist.group.WORLD
        )
        if os.environ.get("SERVES") == "1":
            policy.serving()
        try:
            for call in range(1, int(os.environ.get("LAST", 10**9)) + 1):
                if (rank, call) == (1, 5):
                    time.sleep(float(os.environ.get("NAP", 0)))
                comm.allreduce_fusion(torch.ones(4, 64), workspace, 0)
                calls.write(f"{call}\n")
        except RuntimeError:
            calls.write("raised\n")
        while not (folder / "over").exists():
            time.sleep(0.02)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
