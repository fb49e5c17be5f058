"""Guards of a workspace taken away, one at a time: the check that holds with a guard must then fail, and say why."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from common.cases import ownership


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """`Workspace` as if it had no such methods of its own."""
    from mnnvl_ar import Workspace

    kept = {name: vars(Workspace)[name] for name in names}
    for name in names:
        delattr(Workspace, name)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Workspace, name, method)


def uncaught() -> AbstractContextManager[object]:
    """The monitor lets through what `on_fault` raises."""
    from mnnvl_ar import monitor

    say = monitor._say

    def said(text: str, *arguments: object) -> None:
        if text.startswith("on_fault of workspace"):
            raise sys.exc_info()[1]  # type: ignore[misc]
        say(text, *arguments)

    return mock.patch.object(monitor, "_say", said)


def unforced() -> AbstractContextManager[object]:
    """`close(force=True)`, `wake` and `recover` end no call that waits."""
    import mnnvl_ar.workspace as module

    real = module.ops
    changed = mock.Mock(
        wraps=real,
        _workspace_close=lambda handle, force: real._workspace_close(handle, False),
        _workspace_sleep=lambda handle, end: real._workspace_sleep(handle, False),
    )
    return mock.patch.object(module, "ops", changed)


# By name: the check and its arguments, what takes its guard away, and what the check says then.
CONTROLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Callable[[], AbstractContextManager[object]], str]] = {
    "copy": (ownership.check_copies, (), lambda: without("__copy__"), "TypeError: a Workspace cannot be pickled"),
    "deepcopy": (
        ownership.check_copies,
        (),
        lambda: without("__deepcopy__"),
        "TypeError: a Workspace cannot be pickled",
    ),
    "pickle": (
        ownership.check_copies,
        (),
        lambda: without("__reduce__"),
        "is not pickleable|cannot pickle",  # said of something that it holds
    ),
    "copy and pickle": (
        ownership.check_copies,
        (),
        lambda: without("__copy__", "__reduce__"),  # another object, on the same memory
        r"assert copy\.copy\(workspace\) is copy",
    ),
    **{
        f"on_fault, {name}": (
            ownership.check_on_fault_raises,
            (name,),
            uncaught,
            "nothing says what on_fault raised",
        )
        for name in ownership.RAISED
    },
    "close": (ownership.check_close_ends_calls, (), unforced, "is in a call of another thread"),
    "recover": (ownership.check_recover_ends_calls, (), unforced, "is in a call of another thread"),
}


def check_without(rank: Any, control: str) -> None:
    check, arguments, unguarded, _ = CONTROLS[control]
    with unguarded(), mock.patch.object(ownership, "PATIENCE", 3.0):
        check(rank, *arguments)
