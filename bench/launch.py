"""One process a GPU without torchrun, and a watch over them: a peer that hangs or crashes is left out, and the bench
goes on.

Kernels that spin cannot be stopped from within, so the processes are ended and started again without the peer that was
at work; cells already recorded are not run again. Only processes started here are ever ended.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import progress

POLL = 0.2
WRONG = 3  # exit status of a rank that measured everything, and found a wrong result of ours


def run(command: Sequence[str], processes: int, *, deadline: float) -> int:
    """Runs `command` (python arguments) in `processes` ranks; what it takes in addition: --without PEER=REASON,
    --resume,
    --scratch FILE.

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
        status, trouble = _once([sys.executable, *command, *extra], processes, file, deadline)
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
    port = _free_port()
    children = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            progress.VARIABLE: str(file),
        }
        children.append(subprocess.Popen(command, env=environment))
    try:
        return _watch(children, file, deadline)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for child in children:
            child.wait()


def _watch(children: list[subprocess.Popen[bytes]], file: Path, deadline: float) -> tuple[int, str]:
    started = time.time()
    while True:
        codes = [child.poll() for child in children]
        if WRONG in codes:  # results are in, and some are not right
            return WRONG, ""
        if failed := [(rank, code) for rank, code in enumerate(codes) if code]:
            return 1, f"rank {failed[0][0]} ended with status {failed[0][1]}"
        if all(code == 0 for code in codes):
            return 0, ""
        if time.monotonic() > deadline:
            return 1, "out of time"
        stage, since = progress.read(file)
        if time.time() - max(since, started) > stage.limit:
            return 1, f"no progress in {stage.limit:.0f} s"
        time.sleep(POLL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
