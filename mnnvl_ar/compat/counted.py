"""How many calls a process has served, replayed ones too, where MNNVL_AR_CALLS names a folder.

    FOLDER/PID.json, replaced every PERIOD seconds while there is a workspace of the front:
    {"pid", "rank", "world_size", "when": Unix time,
     "made": {pattern: calls that Python made or put into graphs, by FlashInfer's code; a replayed one once},
     "workspaces": [{"handle", "calls", "nbytes", "transport"}]}

`calls` is the device's own count (`Workspace.calls`), so a captured call counts each time it runs. A workspace that was
closed keeps its last count. What came between the last look and an end, or a sleep, is not in it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from mnnvl_ar.compat.calls import made
from mnnvl_ar.compat.settings import Settings
from mnnvl_ar.errors import MnnvlArError
from mnnvl_ar.workspace import Workspace

PERIOD = 1.0  # seconds

_log = logging.getLogger("mnnvl_ar")
_lock = threading.Lock()
_seen: list[_Seen] = []
_thread: threading.Thread | None = None
_pid = os.getpid()


class _Seen:
    """A workspace and what it has counted, those it forgot when it slept included."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = weakref.ref(workspace)
        self._before = self._last = 0
        self.rank, self.world_size, self.device = workspace.rank, workspace.world_size, workspace.device
        self._fixed = {
            "handle": workspace.handle,
            "nbytes": workspace.nbytes,
            "transport": workspace.transport,
        }

    def told(self) -> dict[str, Any]:
        workspace = self._workspace()
        if workspace is not None:
            with contextlib.suppress(MnnvlArError):  # closed, asleep, or the driver is gone before us
                now = workspace.calls
                if now < self._last:
                    self._before += self._last
                self._last = now
        return {**self._fixed, "calls": self._before + self._last}


def watch(workspace: Workspace, settings: Settings) -> None:
    """A new workspace of the front. Does nothing if nobody has asked for counts."""
    global _lock, _thread, _pid
    if not settings.calls:
        return
    if _pid != os.getpid():  # a forked child: all of this is the parent's
        _lock, _thread, _pid = threading.Lock(), None, os.getpid()
        _seen.clear()
    with _lock:
        _seen.append(_Seen(workspace))
        if _thread is None:
            folder = Path(settings.calls)
            thread = threading.Thread(target=_run, args=(folder,), name="mnnvl_ar calls", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no room for one
                _log.warning("calls are not counted: %s", error)
            else:
                _thread = thread


def write(folder: Path) -> None:
    """One look at each workspace, and the file; one thread at a time."""
    with _lock:
        told = {
            "pid": os.getpid(),
            "rank": _seen[0].rank,
            "world_size": _seen[0].world_size,
            "when": time.time(),
            "made": {str(pattern): number for pattern, number in enumerate(made) if number},
            "workspaces": [each.told() for each in _seen],
        }
        file = folder / f"{told['pid']}.json"
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(told))
        draft.replace(file)


def _run(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(each.device.type == "cuda" for each in _seen):
            _look_beside_captures()
        while True:
            write(folder)
            time.sleep(PERIOD)
    except Exception:
        _log.exception("calls are not counted any more")


def _look_beside_captures() -> None:
    """This thread may copy from the device although another one captures."""
    from cuda.bindings import driver

    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    status, _ = driver.cuThreadExchangeStreamCaptureMode(relaxed)
    if status != driver.CUresult.CUDA_SUCCESS:  # looking would end the other's capture
        raise MnnvlArError(f"this thread cannot look beside captures: {status.name}")
