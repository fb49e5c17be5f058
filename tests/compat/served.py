"""A rank of a server as its own process, for `test_policy`: python -m compat.served RANK SIZE FOLDER

It loads vLLM's plugin as a worker does, makes a workspace, and calls for ever. After each call that returned it writes
the call's number to FOLDER/RANK.calls, and "raised" if one raised. Then, or after LAST calls, it stays alive until
FOLDER/over is there. Environment: SERVES=1, the worker has warmed up before the calls; LAST; NAP, seconds that rank 1
sleeps before its fifth call.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

import mnnvl_ar_plugins
from compat.stand_in import standing_in
from mnnvl_ar.compat import policy


class Worker:
    """As much of vLLM's as we wrap."""

    def compile_or_warm_up_model(self) -> None: ...


def main(rank: int, size: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    with standing_in("0.6.14") as comm, (folder / f"{rank}.calls").open("w", buffering=1) as calls:
        mnnvl_ar_plugins.vllm()
        gpu_worker: Any = ModuleType(policy.MOMENTS["vllm"][0])  # loaded after the plugins, as there
        gpu_worker.Worker, sys.modules[gpu_worker.__name__] = Worker, gpu_worker
        workspace = comm.create_allreduce_fusion_workspace(
            "mnnvl", size, rank, 16, 64, torch.float32, group=dist.group.WORLD
        )
        if os.environ.get("SERVES") == "1":
            Worker().compile_or_warm_up_model()
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
