"""One thread a process that looks at every open workspace, logs each fault once, and hears of peers that are gone.

It is for those who do not look themselves: a server whose other ranks hang, or a rank that makes no calls any more.
Every GLANCE it looks for a record that a call of this rank has left, in host memory; every PERIOD for what peers have
marked, which is one copy of 16 KiB at most, and takes no lock that a call takes. Logger "mnnvl_ar", level ERROR.

At every GLANCE it also listens to the lifelines (memory/lifeline.py), passes on what it hears, and ends the calls of
this rank that a peer who is gone owes something: as long as the memory is mapped, after `close` too, while graphs may
run. A peer that has left in good order may owe nothing for as long as the workspace lives, so as long as no call waits
these looks become rarer, down to one a PERIOD, and each is a copy of 32 bytes.

A call that holds its stream (`Workspace(hold=)`) is let go when `on_fault` has returned. `on_fault` is called once the
fault is logged, or after LOG_SECONDS: a log that blocks must not outlast the hold. Each fault is told in a thread of
its own: while an `on_fault` takes its time, this process, and by rank 0 all others, still hear who dies. Whatever it
raises is logged too, and does not end the process: Python lets a thread end nothing but itself.
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
from mnnvl_ar.diagnosis import Fault, read_fault
from mnnvl_ar.errors import WorkspaceBroken
from mnnvl_ar.memory.lifeline import Gone, Lifeline

PERIOD = 0.5  # seconds between two looks
GLANCE = 0.05
PATIENCE = 10.0  # seconds that a look may be under way
LOG_SECONDS = 0.25  # that `on_fault` waits for a log
IDLE, WAITS, DONE = range(3)  # diagnosis::Loss of csrc/diagnosis/diagnosis.h

OnFault = Callable[[WorkspaceBroken], object]

_log = logging.getLogger("mnnvl_ar")


class Watched(Protocol):
    """What the monitor does not keep alive: nor what `on_fault` belongs to, which may hold it."""

    @property
    def on_fault(self) -> OnFault | None: ...


class Pause:
    """Between two looks for calls that wait for a peer who has left: GLANCE, then longer, and no longer than PERIOD."""

    def __init__(self) -> None:
        self._seconds, self._until = GLANCE, 0.0

    def is_over(self) -> bool:
        return time.monotonic() >= self._until

    def begin(self, longer: bool) -> None:
        self._seconds = min(2 * self._seconds, PERIOD) if longer else 0.0
        self._until = time.monotonic() + self._seconds
        self._seconds = max(self._seconds, GLANCE)


class _Watch(weakref.ref[Watched]):
    """Of one `watch`, which a later one of the same owner is not. `weakref.ref` itself gives the same object again."""

    is_being_told = False  # of its fault
    is_of_replays = False  # of a closed workspace: that a peer is gone is no news, unless a replay has waited for it


class Monitor:
    """Watches handles until they are forgotten, and lifelines until this rank has left. The thread runs while there is
    something to watch."""

    def __init__(self) -> None:
        # Collecting garbage may close a workspace in any thread, at any point of it: also where this is held.
        self._lock = threading.RLock()
        self._watched: dict[int, _Watch] = {}
        self._lifelines: dict[int, Lifeline] = {}  # by handle
        self._pauses: weakref.WeakKeyDictionary[Lifeline, dict[Gone, Pause]] = weakref.WeakKeyDictionary()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._tellers: set[threading.Thread] = set()

    def start(self) -> None:
        """The thread, if there is none: it ends with the next `forget` that leaves nothing to watch. Raises
        `RuntimeError` where there is no room for one."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                stop = threading.Event()
                thread = threading.Thread(target=self._run, args=(stop,), name="mnnvl_ar monitor", daemon=True)
                thread.start()
                self._stop, self._thread = stop, thread

    def watch(self, handle: int, owner: Watched, lifeline: Lifeline) -> None:
        """Until `forget`, or until nobody holds `owner` any more. Never raises: who wants to know whether there is room
        for the thread starts it before."""
        with self._lock:
            self._watched[handle] = _Watch(owner)
            self._lifelines[handle] = lifeline
        try:
            self.start()
        except RuntimeError as error:
            _log.error("nobody watches workspace %d until another one is made or woken, but check(): %s", handle, error)

    def pass_on(self, handle: int, owner: Watched) -> None:
        """Of a workspace that is closed, and whose fault is not told yet: `owner` is asked from now on."""
        with self._lock:
            if handle in self._watched and not self._watched[handle].is_being_told:
                self._watched[handle] = watch = _Watch(owner)
                watch.is_of_replays = True

    def begin_anew(self, handle: int) -> None:
        """The workspace is to be as if no call had been made, and watched again. Who still tells of a fault from before
        must not let go the next one's stream."""
        with self._lock:
            self._watched.pop(handle, None)

    def forget(self, handle: int) -> list[threading.Thread]:
        """No more is said of this workspace, and if its rank has left, no more heard. Ends with the last handle: then
        these are the threads that end. Does not wait for a look that is under way; closing does."""
        with self._lock:
            self._watched.pop(handle, None)
            if handle in self._lifelines and self._lifelines[handle].has_left:
                del self._lifelines[handle]
            if not self._watched and not self._lifelines:
                return self._ending()
        return []

    def _ending(self) -> list[threading.Thread]:
        self._stop.set()
        ending = [*self._tellers, *([] if self._thread is None else [self._thread])]
        self._thread = None
        return ending

    def end(self) -> None:
        """At exit: no look is under way afterwards, unless the driver, or an `on_fault`, holds one up."""
        with self._lock:
            self._watched.clear()
            self._lifelines.clear()
            ending = self._ending()
        join(ending, 1.0)

    def _run(self, stop: threading.Event) -> None:
        looked = time.monotonic()
        while not stop.wait(GLANCE):
            with self._lock:
                watched, lifelines = self._watched.copy(), self._lifelines.copy()
            lifelines = {handle: line for handle, line in lifelines.items() if not line.has_left}
            ended = {handle for handle, lifeline in lifelines.items() if self._listen(handle, lifeline)}
            is_time = time.monotonic() - looked >= PERIOD
            if is_time:
                looked = time.monotonic()
            for handle, owner in watched.items():
                if owner.is_being_told:
                    continue
                is_due = is_time or handle in ended or ops._workspace_has_fault(handle)
                if owner() is None or (is_due and self._look(handle, owner)):
                    self._drop(handle, owner)

    def _drop(self, handle: int, owner: _Watch) -> bool:
        """False of one that was recovered meanwhile: another watch is of its faults to come."""
        with self._lock:
            is_watched = self._watched.get(handle) is owner
            if is_watched:
                del self._watched[handle]
        return is_watched

    def _listen(self, handle: int, lifeline: Lifeline) -> bool:
        """Whether there is a fault now, since a peer is gone."""
        ended = False
        try:
            heard = lifeline.look()
            for text in lifeline.warnings():
                _say("%s", text, level=logging.WARNING)
            for gone in heard:
                pause = self._pauses.setdefault(lifeline, {}).setdefault(gone, Pause())
                if not pause.is_over():
                    continue
                loss = ops._workspace_lose(handle, gone.rank, gone.how, gone.next)
                pause.begin(longer=loss == IDLE)
                if loss == DONE:
                    lifeline.settled(gone)
                    ended = True
        except Exception:
            text = "the monitor cannot listen to the peers of workspace %d any more: %s"
            _say(text, handle, traceback.format_exc())
            with self._lock:
                if self._lifelines.get(handle) is lifeline:
                    del self._lifelines[handle]
        return ended

    def _look(self, handle: int, owner: _Watch) -> bool:
        """Whether nothing is to be said about this workspace any more. A fault is told beside this thread."""
        try:
            fault = read_fault(handle)
        except Exception:
            _say("the monitor cannot look at workspace %d any more: %s", handle, traceback.format_exc())
            return True
        is_news = not owner.is_of_replays or ops._workspace_has_fault(handle)
        if fault is None or not is_news:
            return False
        with self._lock:
            if self._watched.get(handle) is not owner:  # passed on meanwhile, or forgotten
                return False
            owner.is_being_told = True
        teller = threading.Thread(target=self._tell, args=(handle, owner, fault), daemon=True, name="mnnvl_ar on_fault")
        try:
            with self._lock:
                teller.start()
                self._tellers.add(teller)
        except RuntimeError:  # out of threads
            self._tell(handle, owner, fault)
        return False

    def _tell(self, handle: int, owner: _Watch, fault: Fault) -> None:
        _say("workspace %d is broken: %s", handle, fault.message())
        try:
            on_fault = getattr(owner(), "on_fault", None)
            if on_fault is not None:
                on_fault(fault.error())
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: the other workspaces are still watched
            _say("on_fault of workspace %d failed with %s", handle, "".join(traceback.format_exception(error)))
        finally:
            with self._lock:
                if self._drop(handle, owner):
                    ops._workspace_answer(handle)
                self._tellers.discard(threading.current_thread())


def _say(text: str, *arguments: object, level: int = logging.ERROR) -> None:
    """Logs it, and waits for that, but not for long; and whatever a log raises ends nobody else."""
    try:
        speaker = threading.Thread(target=_log.log, args=(level, text, *arguments), daemon=True, name="mnnvl_ar log")
        speaker.start()
    except RuntimeError:  # out of threads
        _log.log(level, text, *arguments)
    else:
        speaker.join(LOG_SECONDS)


_monitor = Monitor()


def start() -> None:
    _monitor.start()


def watch(handle: int, owner: Watched, lifeline: Lifeline) -> None:
    _monitor.watch(handle, owner, lifeline)


def pass_on(handle: int, owner: Watched) -> None:
    _monitor.pass_on(handle, owner)


def begin_anew(handle: int) -> None:
    _monitor.begin_anew(handle)


def forget(handle: int) -> list[threading.Thread]:
    return _monitor.forget(handle)


def join(threads: list[threading.Thread], seconds: float = PATIENCE) -> None:
    """Of what `forget` has returned: until all have ended, or are seen to be held up by an `on_fault`."""
    until = time.monotonic() + seconds
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, until - time.monotonic()))


def _after_fork() -> None:
    global _monitor
    _monitor = Monitor()  # the thread and the workspaces are the parent's


atexit.register(lambda: _monitor.end())
os.register_at_fork(after_in_child=_after_fork)
