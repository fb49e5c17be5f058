"""The ranks that one node runs for one part: processes, their logs, and what each is at."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import progress
from bench.launch import WRONG
from bench.results import ROOT

TAIL = 4000  # characters of a log that go into the record
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)  # before any fork


class Ranks:
    """rank first, first + 1, ... of `world`, as many as `count`. folder: of their logs and what they are at. gpus: of
    this node, which more ranks than that share in turn."""

    def __init__(
        self,
        arguments: Sequence[str],
        first: int,
        count: int,
        world: int,
        meeting: tuple[str, int],
        folder: Path,
        environment: Mapping[str, str],
        gpus: int = 0,
    ) -> None:
        self.numbers = range(first, first + count)
        self.folder, self._read = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
        for local, rank in enumerate(self.numbers):
            about: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": local % (gpus or count), "WORLD_SIZE": world}
            about |= {"MASTER_ADDR": meeting[0], "MASTER_PORT": meeting[1], "PYTHONUNBUFFERED": 1}
            told = {**inherited, **environment, **{name: str(value) for name, value in about.items()}}
            told[progress.VARIABLE] = str(self._stage_file(rank))
            self._stage_file(rank).unlink(missing_ok=True)
            with self.log(rank).open("wb") as out, self.errors(rank).open("wb") as errors:
                self._processes[rank] = subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=ROOT,
                    env=told,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=errors,
                    start_new_session=True,  # so that what a rank has started ends with it
                    preexec_fn=functools.partial(_end_with, os.getpid()),
                )

    def log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"

    def errors(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.err"

    def _stage_file(self, rank: int) -> Path:
        return self.folder / f".rank{rank}.stage"

    @property
    def running(self) -> list[int]:
        return [rank for rank, process in self._processes.items() if process.poll() is None]

    @property
    def wrong(self) -> bool:
        """A rank has measured everything and found a wrong result of ours."""
        return any(process.poll() == WRONG for process in self._processes.values())

    def failed(self) -> dict[int, str]:
        """How each rank that failed has ended."""
        ended = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: _how(status) for rank, status in ended.items() if status not in (None, 0, WRONG)}

    def state(self, rank: int) -> dict[str, Any]:
        """What a rank is at, in words, for how many seconds, and "stopped" or how it has ended."""
        stage, when = progress.read(self._stage_file(rank))
        status = self._processes[rank].poll()
        mark = _process_state(self._processes[rank].pid) if status is None else _how(status)
        return {"rank": rank, "at": stage.what, "limit": stage.limit, "seconds": time.time() - when, "process": mark}

    def tail(self, rank: int) -> str:
        text = "".join(file.read_text(errors="replace")[-TAIL:] for file in (self.log(rank), self.errors(rank)))
        return text[-TAIL:]

    def news(self) -> str:
        """What the first of these ranks has printed since this was called last."""
        with self.log(self.numbers[0]).open("rb") as file:
            file.seek(self._read)
            text = file.read()
        self._read += len(text)
        return text.decode(errors="replace")

    def end(self) -> None:
        """Kills what still runs, and all that it has started. Returns when it is gone."""
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes.values():
            process.wait()


def _end_with(node: int) -> None:
    """A node's program that is killed ends nobody. Without a Slurm that does, its ranks would go on for minutes."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != node:  # it was killed before this
        os.kill(os.getpid(), signal.SIGKILL)


def _how(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _process_state(pid: int) -> str:
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return {"T": "stopped", "t": "stopped", "D": "in the kernel", "Z": "gone"}.get(letter, "")
