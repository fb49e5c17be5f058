"""When memory that is bound to a multicast object may go: once every rank has left, and not before.

A mapping of a peer's memory keeps that memory, so over unicast each rank drops what is its own when it likes: what a
late peer still sends lands in memory that nobody reads. A binding keeps nothing for those who send: a store to a team
of which a member is not bound is an error of the sender's context. So a rank that closes or sleeps takes its addresses
away at once, says so, and keeps memory and binding (`keep`), of which no address of its own leads to any more. They go
when all ranks have said the like: whoever has left sends nothing more.

Contract
  * Nothing here waits for a peer, but `wait`. Who looks is a thread of this module, which lives while something is
    kept, and whoever calls `look`.
  * What is kept goes after the last rank has left (`Lifeline.all_have_left`), when all ranks have met to bring up
    memory anew (`settle`), or with the process.
  * A rank that is silent, or was connected by a rank 0 that is gone, has not left: then it is with the process.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable

from .lifeline import Lifeline

_SOONEST, _LATEST = 0.02, 0.5  # seconds between two looks

_log = logging.getLogger("mnnvl_ar")


class _Kept:
    def __init__(self, lifeline: Lifeline, give_back: Callable[[], object]) -> None:
        self.lifeline = lifeline
        self._give_back: Callable[[], object] | None = give_back
        self._lock = threading.Lock()  # whoever comes second waits for the first

    def give_back(self) -> None:
        with self._lock:
            give_back, self._give_back = self._give_back, None
            if give_back is not None:
                give_back()
                self.lifeline.end()
        _forget(self)


_lock = threading.Lock()  # of the two below
_kept: list[_Kept] = []
_thread: threading.Thread | None = None
_nothing_kept = threading.Event()


def keep(lifeline: Lifeline, give_back: Callable[[], object]) -> None:
    """Calls `give_back`, which must not raise, in any thread, once all ranks have left. `lifeline`: of a rank that has
    left and stays to listen; it ends then."""
    global _thread
    with _lock:
        _kept.append(_Kept(lifeline, give_back))
        _nothing_kept.clear()
        if _thread is None:
            _thread = threading.Thread(target=_run, name="mnnvl_ar parting", daemon=True)
            _thread.start()


def look() -> None:
    """Gives back what nobody may send to any more. Never waits for a peer."""
    with _lock:
        kept = list(_kept)
    for entry in kept:
        try:
            entry.lifeline.look()
            done = entry.lifeline.all_have_left()
        except Exception:
            _log.exception("nothing is heard of peers any more: memory that was given back stays with this process")
            _forget(entry)
            continue
        if done:
            entry.give_back()


def settle(lifeline: Lifeline) -> None:
    """All ranks have met, and none sends any more: what is kept for this lifeline goes now."""
    for entry in _of(lifeline):
        entry.give_back()


def wait(lifeline: Lifeline, seconds: float) -> list[int]:
    """Until what is kept for this lifeline is gone, and if nothing else is kept, the thread, too. Returns the ranks
    that have not left by then."""
    until = time.monotonic() + seconds
    while True:
        look()
        if not _of(lifeline):
            break
        if time.monotonic() >= until:
            return lifeline.staying()
        time.sleep(_SOONEST)
    with _lock:
        thread = None if _kept else _thread
    if thread is not None:
        thread.join()
    return []


def _of(lifeline: Lifeline) -> list[_Kept]:
    with _lock:
        return [entry for entry in _kept if entry.lifeline is lifeline]


def _forget(entry: _Kept) -> None:
    with _lock:
        if entry in _kept:
            _kept.remove(entry)
        if not _kept:
            _nothing_kept.set()


def _run() -> None:
    """Looks become rarer: ranks that go together are soon gone, and one that sleeps alone may do so for hours."""
    global _thread
    pause = _SOONEST
    while True:
        _nothing_kept.wait(pause)
        with _lock:
            if not _kept:
                _thread = None
                return
        pause = min(1.1 * pause, _LATEST)
        look()


def _end() -> None:
    """At exit: what is kept goes with the process."""
    with _lock:
        _kept.clear()
        _nothing_kept.set()
        thread = _thread
    if thread is not None:
        thread.join(1.0)


def _after_fork() -> None:
    global _lock, _thread
    _lock, _thread = threading.Lock(), None
    _kept.clear()  # the parent's


atexit.register(_end)
os.register_at_fork(after_in_child=_after_fork)
