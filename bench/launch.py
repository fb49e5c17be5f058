"""One process a GPU without torchrun, and a watch over them: a peer that hangs or crashes is left out, and the bench
goes on.

Kernels that spin cannot be stopped from within, so the processes are ended and started again without the peer that was
at work; cells already recorded are not run again.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import progress
from mnnvl_ar.ranks import Rank, RankPool, Running

POLL = 0.2
WRONG = 3  # exit status of a rank that measured everything, and found a wrong result of ours

_kept: list[socket.socket] = []  # of free_port


def run(command: Sequence[str], processes: int, *, deadline: float) -> int:
    """Runs `command` (a script and its arguments) in `processes` ranks; what it takes in addition:
    --without PEER=REASON, --resume, --scratch FILE.

    deadline: time.monotonic() at which everything is ended. Returns an exit status.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _run(
            [*command, "--scratch", str(Path(folder) / "rows.json")], processes, Path(folder) / "progress", deadline
        )


def _run(command: Sequence[str], processes: int, file: Path, deadline: float) -> int:
    without: list[str] = []
    while True:
        extra = [word for reason in without for word in ("--without", reason)] + (["--resume"] if without else [])
        file.unlink(missing_ok=True)
        status, trouble = _once([*command, *extra], processes, file, deadline)
        stage, _ = progress.read(file)
        if not trouble:
            return status
        if trouble == "out of time":
            print(f"bench: out of time at: {stage.what}", flush=True)
            return status
        print(f"bench: {trouble} at: {stage.what}", flush=True)
        if stage.peer is None or any(reason.startswith(f"{stage.peer}=") for reason in without):
            return status
        without.append(f"{stage.peer}={trouble} at: {stage.what}")
        print(f"bench: going on without {stage.peer}", flush=True)


def _once(command: Sequence[str], processes: int, file: Path, deadline: float) -> tuple[int, str]:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), progress.VARIABLE: str(file)}
    with RankPool(processes, env=environment) as pool:  # on the CPU: ranks choose their device by their arguments
        status, trouble = _watch(pool.start(_program, command), file, deadline)
        if status:
            pool.discard()
        return status, trouble


def _program(rank: Rank, command: Sequence[str]) -> int:
    """Runs a script as python and torchrun would, in this process. Returns its exit status."""
    multiprocessing.current_process().daemon = False  # peers may start processes of their own
    gpus = torch.cuda.device_count() or rank.world_size  # more ranks than GPUs share them
    place = {"RANK": rank.rank, "LOCAL_RANK": rank.rank % gpus, "WORLD_SIZE": rank.world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    if rank.rank:
        os.environ.pop(progress.VARIABLE, None)  # the first one tells for all
    sys.argv[:] = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        raise  # a text, which is shown like any other error
    return 0


def _watch(running: Running, file: Path, deadline: float) -> tuple[int, str]:
    started = time.time()
    while True:
        running.wait(POLL)
        if (True, WRONG) in running.ended.values():  # results are in, and some are not right
            return WRONG, ""
        for rank, (ok, value) in running.ended.items():
            if not ok:
                print(f"rank {rank}: {value}", file=sys.stderr, flush=True)
                return 1, f"rank {rank} failed: {value.strip().splitlines()[-1]}"
            if value:
                return 1, f"rank {rank} ended with status {value}"
        if running.is_over:
            return 0, ""
        if time.monotonic() > deadline:
            return 1, "out of time"
        stage, since = progress.read(file)
        if time.time() - max(since, started) > stage.limit:
            return 1, f"no progress in {stage.limit:.0f} s"


def free_port() -> int:
    """A port that nobody on this host listens at, and that no other process is given while this one lives: it stays
    bound here, in the way (`SO_REUSEADDR`) that lets a store listen there all the same."""
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    _kept.append(kept)
    port: int = kept.getsockname()[1]
    return port
