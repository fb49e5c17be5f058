"""What a fault does to a server's process, and how long calls wait for their peers before and after it serves.

Where a server's plugin is active, or MNNVL_AR_ON_FAULT=exit:

    a fault    whichever rank found it, ends every rank's process that hears of it, by `os._exit(STATUS)`, after one
               line that names the rank at fault, on stderr and in the server's log. The call that found it does not
               return meanwhile (MNNVL_AR_HOLD), so nothing computed behind it leaves the process
    deadline   MNNVL_AR_STARTUP_DEADLINE until `serving`, as ranks are far apart while they compile and capture;
               MNNVL_AR_DEADLINE from then on, captured calls included. A program without a plugin says `serving`
               itself, or leaves it. At most half of the server's own limit for a step (`limits`), so that the rank
               at fault is named before the server ends; before `serving` only where that moment is not known

When a server serves is learnt from a method of its own, wrapped when the first workspace is made: its module is loaded
by then, and needs not be imported for this. Where it is not found the deadline stays long, and a line says so.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from mnnvl_ar.compat import limits
from mnnvl_ar.compat.settings import Settings
from mnnvl_ar.errors import WorkspaceBroken
from mnnvl_ar.workspace import Workspace

STATUS = 87  # of a process that a fault has ended: no signal's, no shell's, not Python's 1 or 2
LAST_WORDS = 1.0  # seconds: a log that blocks must not keep the process, which would let the held call go on
# Module, class and method. The server serves when a call of it has returned.
MOMENTS = {
    # Compiled, warmed up and captured; before the engine takes requests.
    "vllm": ("vllm.v1.worker.gpu_worker", "Worker", "compile_or_warm_up_model"),
    # The first batch has its results. The event loop begins earlier, but kernels compiled in its first step count too.
    "sglang": ("sglang.srt.managers.scheduler", "Scheduler", "process_batch_result"),
}
_MARK = "_mnnvl_ar_serving"

_log = logging.getLogger("mnnvl_ar")
_lock = threading.Lock()
_workspaces: WeakKeyDictionary[Workspace, Settings] = WeakKeyDictionary()
_server = ""  # whose plugin is active here
_serving = False
_lines_told: set[str] = set()
_told = False  # that it cannot be learnt when the server serves


def activate(server: str) -> None:
    """This process is `server`'s, one of `MOMENTS`."""
    global _server
    _server = server


def handler(settings: Settings) -> Callable[[WorkspaceBroken], object] | None:
    """What to call with a fault; None where it is only logged."""
    return end if (settings.on_fault or ("exit" if _server else "log")) == "exit" else None


def deadline(settings: Settings) -> float:
    """Of a workspace that is made now."""
    if _serving:
        return deadline_served(settings)
    return _within_a_step(settings.startup_deadline) if _told else settings.startup_deadline


def deadline_served(settings: Settings) -> float:
    """Once the server serves."""
    return _within_a_step(settings.deadline)


def _within_a_step(wanted: float) -> float:
    limit = limits.of_a_step(_server)
    return wanted if limit is None else min(wanted, limits.SHARE * limit.seconds)


def adopt(workspace: Workspace, settings: Settings) -> None:
    """A new workspace of the front: `serving` is for it, too, and may have been said while it was made."""
    _learn_when()
    _tell_of_limits(settings)
    with _lock:
        _workspaces[workspace] = settings
        _set_deadline(workspace, settings)


def obey(workspace: Workspace) -> None:
    """A workspace that was asleep, and heard nothing, does what was said meanwhile."""
    with _lock:
        if workspace in _workspaces:
            _set_deadline(workspace, _workspaces[workspace])


def serving() -> None:
    """From now on calls wait MNNVL_AR_DEADLINE, on all workspaces of the front in this process, later ones included.
    May be called often."""
    global _serving
    if _serving:
        return
    with _lock:
        _serving = True
        present = list(_workspaces.items())
        for workspace, settings in present:
            _set_deadline(workspace, settings)
    for seconds in sorted({deadline_served(settings) for _, settings in present}):
        _log.info("mnnvl_ar: the server serves; calls wait %g s for their peers from now on", seconds)


def _tell_of_limits(settings: Settings) -> None:
    """What was made of deadlines that the server's own limit does not allow."""
    limit = limits.of_a_step(_server)
    if limit is None:
        return
    served = deadline_served(settings)
    if served != settings.deadline:
        tell_once(
            f"mnnvl_ar: MNNVL_AR_DEADLINE is {settings.deadline:g} s; calls will wait {served:g} s, half of "
            f"{_server}'s own limit for a step ({limit.name}: {limit.seconds:g} s)"
        )
    if deadline(settings) >= limit.seconds:
        tell_once(
            f"mnnvl_ar: until the server serves calls wait {settings.startup_deadline:g} s, longer than {_server}'s "
            f"own limit for a step ({limit.name}: {limit.seconds:g} s): the first may end unnamed"
        )


def tell_once(text: str) -> None:
    """A warning that the log of this process has once."""
    if text not in _lines_told:
        _lines_told.add(text)
        _log.warning("%s", text)


def _set_deadline(workspace: Workspace, settings: Settings) -> None:
    wanted = deadline(settings)
    if workspace.deadline != wanted:
        with contextlib.suppress(RuntimeError):  # closed, or asleep: `obey`
            workspace.deadline = wanted


def end(error: WorkspaceBroken) -> None:
    """Ends the process. Does not return, and waits for nothing without a bound."""
    try:
        speaker = threading.Thread(target=_say, args=(last_words(error),), daemon=True)
        speaker.start()
        speaker.join(LAST_WORDS)
    finally:
        os._exit(STATUS)


def last_words(error: WorkspaceBroken) -> str:
    """One line, whatever the error's text has."""
    who = f"rank {error.peer} is at fault" if error.peer >= 0 else "who is at fault could not be made out here"
    return f"mnnvl_ar ends rank {error.rank} with status {STATUS}: {who}. {' '.join(str(error).split())}"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, f"{line}\n".encode())  # past every buffer and lock; the log may be written by another thread
    _log.error("%s", line)
    log: logging.Logger | None = _log
    while log is not None:
        for each in log.handlers:
            each.flush()
        log = log.parent if log.propagate else None


def _learn_when() -> None:
    """Wraps the server's method, once."""
    global _told
    if _serving or _server not in MOMENTS:
        return
    module, name, method = MOMENTS[_server]
    owner: Any = getattr(sys.modules.get(module), name, None)
    function = getattr(owner, method, None)
    if not callable(function):
        if not _told:
            _log.warning(
                "mnnvl_ar: %s has no %s.%s.%s here, so it is not known when it serves: the deadline stays long",
                *(_server, module, name, method),
            )
        _told = True
    elif not hasattr(function, _MARK):
        setattr(owner, method, _then_serving(function))


def _then_serving(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        serving()
        return result

    setattr(wrapped, _MARK, True)
    return wrapped
