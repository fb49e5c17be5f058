"""When memory that is bound to a multicast object may go: once every rank has left, and not before.

A mapping of a peer's memory keeps that memory, so over unicast each rank drops what is its own when it likes: what a
late peer still sends lands in memory that nobody reads. A binding keeps nothing for those who send: a store to a team
of which a member is not bound is an error of the sender's context. So a rank that closes or sleeps takes its addresses
away at once, says so, and keeps memory and binding (`keep`), of which no address of its own leads to any more. They go
when all ranks have said the like: whoever has left sends nothing more.

Contract
  * Nothing here waits for a peer, but `wait`. Who looks is a thread of this module, which lives while there is
    something to look after, and whoever calls `look`. Where no thread can be had, as at the interpreter's end, only
    those do.
  * What is kept goes after the last rank has left (`Lifeline.all_have_left`), when all ranks have met to bring up
    memory anew (`settle`), or with the process.
  * `owner`: whose memory it is, any object. It may have left several times: bring-ups that failed, too.
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
    """is_deaf: nothing can be heard of its peers any more, so it stays until ranks meet, or with the process."""

    def __init__(self, owner: object, lifeline: Lifeline, give_back: Callable[[], object]) -> None:
        self.owner, self.lifeline, self.is_deaf = owner, lifeline, False
        self._give_back: Callable[[], object] | None = give_back
        self._lock = threading.RLock()  # whoever comes second waits for the first

    def staying(self) -> list[int]:
        return self.lifeline.others if self.is_deaf else self.lifeline.staying()

    def give_back(self) -> None:
        with self._lock:
            give_back, self._give_back = self._give_back, None
            try:
                if give_back is not None:
                    give_back()
                    self.lifeline.end()
            finally:
                _forget(self)


# Of the three below. Collecting garbage may close a workspace in any thread, also in one that holds this.
_lock = threading.RLock()
_kept: list[_Kept] = []
_thread: threading.Thread | None = None
_nothing_to_do = threading.Event()


def keep(owner: object, lifeline: Lifeline, give_back: Callable[[], object]) -> None:
    """Calls `give_back`, which must not raise, in any thread, once all ranks have left. `lifeline`: of a rank that has
    left and stays to listen; it ends then."""
    global _thread
    with _lock:
        _kept.append(_Kept(owner, lifeline, give_back))
        _nothing_to_do.clear()
        if _thread is None or not _thread.is_alive():
            _thread = _started()


def look() -> None:
    """Gives back what nobody may send to any more. Never waits for a peer."""
    for entry in _entries():
        if entry.is_deaf:
            continue
        try:
            entry.lifeline.look()
            done = entry.lifeline.all_have_left()
            for text in entry.lifeline.warnings():
                _log.warning(text)
        except Exception:
            if _give_up_on(entry):
                _log.exception("nothing is heard of peers any more: memory that was given back stays with this process")
            continue
        if done:
            entry.give_back()


def settle(owner: object) -> None:
    """All ranks have met, and none sends any more: what is kept for this owner goes now."""
    for entry in _entries(owner):
        entry.give_back()


def wait(owner: object, seconds: float) -> list[int]:
    """Until what is kept for this owner is gone, and if nothing else is kept, the thread, too. Returns the ranks that
    have not left by then."""
    until = time.monotonic() + seconds
    while True:
        look()
        kept = _entries(owner)
        if not kept:
            break
        if time.monotonic() >= until or all(entry.is_deaf for entry in kept):
            return sorted({rank for entry in kept for rank in entry.staying()})
        time.sleep(_SOONEST)
    with _lock:
        thread = None if _kept else _thread
    if thread is not None:
        thread.join(max(_SOONEST, until - time.monotonic()))
    return []


def _entries(owner: object = None) -> list[_Kept]:
    with _lock:
        return [entry for entry in _kept if owner is None or entry.owner is owner]


def _forget(entry: _Kept) -> None:
    with _lock:
        if entry in _kept:
            _kept.remove(entry)
        if _is_idle():
            _nothing_to_do.set()


def _give_up_on(entry: _Kept) -> bool:
    """Whether nobody had before."""
    with _lock:
        was_deaf, entry.is_deaf = entry.is_deaf, True
        if _is_idle():
            _nothing_to_do.set()
        return not was_deaf


def _is_idle() -> bool:
    return all(entry.is_deaf for entry in _kept)


def _started() -> threading.Thread | None:
    thread = threading.Thread(target=_run, name="mnnvl_ar parting", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # no room for one, or the interpreter is ending
        _log.info("memory that peers may still send to stays until the next look, or with this process: %s", error)
        return None
    return thread


def _run() -> None:
    """Looks become rarer: ranks that go together are soon gone, and one that sleeps alone may do so for hours."""
    global _thread
    pause = _SOONEST
    while True:
        _nothing_to_do.wait(pause)
        with _lock:
            if _is_idle():
                _thread = None
                return
        pause = min(1.1 * pause, _LATEST)
        look()


def _end() -> None:
    """At exit: what is kept goes with the process."""
    with _lock:
        _kept.clear()
        _nothing_to_do.set()
        thread = _thread
    if thread is not None:
        thread.join(1.0)


def _after_fork() -> None:
    global _lock, _thread, _nothing_to_do
    _lock, _thread, _nothing_to_do = threading.RLock(), None, threading.Event()  # another thread may have held them
    _kept.clear()  # the parent's


atexit.register(_end)
os.register_at_fork(after_in_child=_after_fork)
