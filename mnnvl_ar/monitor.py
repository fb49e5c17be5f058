"""One thread a process that looks at every open workspace and logs each fault once.

It is for those who do not look themselves: a server whose other ranks hang, or a rank that makes no calls any more.
Every GLANCE it looks for a record that a call of this rank has left, in host memory; every PERIOD for what peers have
marked, which is one copy of 16 KiB at most, and takes no lock that a call takes. Logger "mnnvl_ar", level ERROR.

A call that holds its stream (`Workspace(hold=)`) is let go when `on_fault` has returned. `on_fault` is called once the
fault is logged, or after LOG_SECONDS: a log that blocks must not outlast the hold. Whatever it raises is logged too,
and ends neither this thread nor the process: Python lets a thread end nothing but itself.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Protocol

from mnnvl_ar._library import ops
from mnnvl_ar.diagnosis import read_fault
from mnnvl_ar.errors import WorkspaceBroken

PERIOD = 0.5  # seconds between two looks
GLANCE = 0.05
LOG_SECONDS = 0.25  # that `on_fault` waits for a log

OnFault = Callable[[WorkspaceBroken], object]

_log = logging.getLogger("mnnvl_ar")


class Watched(Protocol):
    """What the monitor does not keep alive: nor what `on_fault` belongs to, which may hold it."""

    @property
    def on_fault(self) -> OnFault | None: ...


class Monitor:
    """Watches handles until they are forgotten. The thread runs while there is something to watch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[int, weakref.ref[Watched]] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def watch(self, handle: int, owner: Watched) -> None:
        """Until `forget`, or until nobody holds `owner` any more."""
        with self._lock:
            self._watched[handle] = weakref.ref(owner)
            if self._thread is None:
                self._stop = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._stop,), name="mnnvl_ar monitor", daemon=True
                )
                self._thread.start()

    def forget(self, handle: int) -> None:
        """Ends with the last handle. Does not wait for a look that is under way; closing does."""
        with self._lock:
            self._watched.pop(handle, None)
            if not self._watched:
                self._stop.set()
                self._thread = None

    def end(self) -> None:
        """At exit: no look is under way afterwards, unless the driver holds one up."""
        with self._lock:
            self._watched.clear()
            self._stop.set()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(1.0)

    def _run(self, stop: threading.Event) -> None:
        looked = time.monotonic()
        while not stop.wait(GLANCE):
            with self._lock:
                watched = list(self._watched.items())
            is_time = time.monotonic() - looked >= PERIOD
            if is_time:
                looked = time.monotonic()
            for handle, owner in watched:
                if owner() is None or ((is_time or ops._workspace_has_fault(handle)) and self._look(handle, owner)):
                    with self._lock:
                        if self._watched.get(handle) is owner:
                            del self._watched[handle]

    def _look(self, handle: int, owner: weakref.ref[Watched]) -> bool:
        """Whether all has been said about this workspace."""
        try:
            fault = read_fault(handle)
        except Exception:
            _log.exception("the monitor cannot look at workspace %d any more", handle)
            return True
        if fault is None:
            return False
        _say("workspace %d is broken: %s", handle, fault.message())
        try:
            on_fault = getattr(owner(), "on_fault", None)
            if on_fault is not None:
                on_fault(fault.error())
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: the other workspaces are still watched
            _say("on_fault of workspace %d failed with %s", handle, "".join(traceback.format_exception(error)))
        finally:
            ops._workspace_answer(handle)
        return True


def _say(text: str, *arguments: object) -> None:
    """Logs an error, and waits for that, but not for long."""
    try:
        speaker = threading.Thread(target=_log.error, args=(text, *arguments), daemon=True, name="mnnvl_ar log")
        speaker.start()
    except RuntimeError:  # out of threads
        _log.error(text, *arguments)
    else:
        speaker.join(LOG_SECONDS)


_monitor = Monitor()


def watch(handle: int, owner: Watched) -> None:
    _monitor.watch(handle, owner)


def forget(handle: int) -> None:
    _monitor.forget(handle)


def _after_fork() -> None:
    global _monitor
    _monitor = Monitor()  # the thread and the workspaces are the parent's


atexit.register(lambda: _monitor.end())
os.register_at_fork(after_in_child=_after_fork)
