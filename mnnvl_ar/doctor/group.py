"""Under torchrun: every rank looks at its machine and takes part in the self-test; rank 0 reports on all of them.

Rank 0 reports whatever happens: what blocks runs beside the main thread, which reports what is known when time is up
or when torchrun, having lost a rank, ends the others by SIGTERM. A rank that is not heard of is named.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mnnvl_ar.doctor import machine, selftest
from mnnvl_ar.doctor.board import Board

_AFTER_SIGTERM = 3.0  # seconds for the other ranks' last words; torchrun gives 30 before SIGKILL
_ENDED = "ended by SIGTERM, which torchrun sends when another rank is gone"
# Of the machines by rank, the self-test's summary, the ranks that did not come, and the group's size: an exit status.
Report = Callable[[dict[int, dict[str, Any]], dict[str, Any], list[int], int], int]


def is_given() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run(seconds: float, limit: float, report: Report) -> int:
    """The exit status of this rank; 0 if nothing is wrong as far as it knows. On rank 0 `report` is called, within
    about `limit + seconds` seconds, and decides the status. Ends the process at once if something still hangs then."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    part = _Part(rank, size, seconds, limit)
    signal.signal(signal.SIGTERM, lambda *_: part.stopped.set())
    part.start()
    until = time.monotonic() + limit + seconds
    while not part.heard.wait(0.1) and time.monotonic() < until:
        if part.stopped.is_set():
            until = min(until, time.monotonic() + _AFTER_SIGTERM + 1.0)
    summary = part.summary()
    if rank == 0:
        machines = dict(part.machines)
        status = report(machines, summary, [other for other in range(size) if other not in machines], size)
    else:
        status = int(not summary.get("ok", True))
        if not part.told:
            print(f"mnnvl_ar doctor: rank 0 was not told: {'; '.join(summary['errors'])}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    part.reported.set()
    part.join(2.0)
    if any(thread.is_alive() for thread in (part, part.test) if thread is not None):
        os._exit(status)  # a regular exit would wait for, or crash in, whatever hangs
    return status


class _Part(threading.Thread):
    """What one rank does. `machines` and `results`: by rank, as far as they are known; may be read at any time."""

    def __init__(self, rank: int, size: int, seconds: float, limit: float) -> None:
        super().__init__(daemon=True, name="mnnvl_ar-doctor")
        self.rank, self.size, self.seconds, self.limit = rank, size, seconds, limit
        self.began = time.monotonic()
        self.until = self.began + limit + seconds
        self.machines: dict[int, dict[str, Any]] = {}
        self.results: dict[int, dict[str, Any]] = {}
        self.doing, self.told = "looking at its machine", False
        self.stopped, self.heard, self.reported = threading.Event(), threading.Event(), threading.Event()
        self.test: threading.Thread | None = None

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:
            if not self.told:
                self.results[self.rank] = selftest.failed(error)
        self.heard.set()

    def _run(self) -> None:
        mine = self.machines[self.rank] = machine.examine(int(os.environ.get("LOCAL_RANK", "0")))
        self.doing = "reaching the store"
        board = Board(self.rank, self.limit / 4)
        self.doing = "waiting for the other ranks"
        board.tell("machine", self.rank, mine)
        board.hear("machine", range(self.size), self.machines, self.began + self.limit / 2, self.stopped.is_set)
        self.doing = "in the self-test"
        result = self.results[self.rank] = self._tested(board)
        self.doing = "telling its result"
        board.tell("result", self.rank, result)
        self.told = True
        if self.rank != 0:
            with contextlib.suppress(Exception):  # rank 0, which may host the store, has reported and is gone
                board.hear("reported", [0], {}, self.until, self.stopped.is_set)
            return
        # The others are as far in the test as this rank, or in a call that waits a quarter of the limit; or in a pair,
        # each of which waits for itself.
        seconds = _AFTER_SIGTERM if self.stopped.is_set() else self.limit / 4 + 2.0
        until = self.until if "pairs" in result else min(self.until, time.monotonic() + seconds)
        board.hear("result", self.machines, self.results, until, lambda: False)
        self.heard.set()
        self.reported.wait()
        board.tell("reported", 0, True)

    def _tested(self, board: Board) -> dict[str, Any]:
        missing = [rank for rank in range(self.size) if rank not in self.machines]
        if missing:
            when = "before SIGTERM came" if self.stopped.is_set() else f"within {self.limit / 2:.0f} s"
            return selftest.failed(f"{selftest.ranks(missing)} did not come {when}")
        if self.seconds <= 0:
            return {"ran": False}
        box: list[dict[str, Any]] = []
        self.test = threading.Thread(target=lambda: box.append(self._measured(board)), daemon=True)
        self.test.start()
        while not box and not self.stopped.is_set() and time.monotonic() < self.until:
            self.test.join(0.05)
        if box:
            return box[0]
        return selftest.failed(_ENDED if self.stopped.is_set() else self._stuck())

    def _measured(self, board: Board) -> dict[str, Any]:
        try:
            index = self.machines[self.rank]["uses"]
            device = torch.device("cpu" if index is None else f"cuda:{index}")
            if device.type == "cuda":
                torch.cuda.set_device(device)
            half, store = timedelta(seconds=self.limit / 2), board.another_store()
            dist.init_process_group("gloo", None, half, self.size, self.rank, store)
            assert dist.group.WORLD is not None
            try:
                return selftest.measure(dist.group.WORLD, device, self.seconds, self.limit)
            finally:
                dist.destroy_process_group()
        except Exception as error:
            return selftest.failed(error)

    def summary(self) -> dict[str, Any]:
        """Of the self-test, with a failure for every rank that came and is not heard of, this one included."""
        known, machines = dict(self.results), dict(self.machines)
        if not self.told and known.get(self.rank, {}).get("ok", True):
            known[self.rank] = selftest.failed(self._stuck())
        if self.rank == 0:
            for rank in machines.keys() - known.keys():
                host = machines[rank]["host"]
                known[rank] = selftest.silent(f"killed, stopped or stuck; see its output, and dmesg on host {host}")
        return selftest.summary(known)

    def _stuck(self) -> str:
        return f"still {self.doing} after {time.monotonic() - self.began:.0f} s"
