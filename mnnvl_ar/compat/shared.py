"""One `mnnvl_ar.Workspace` behind all that a server makes over one group: memory is taken once, and given back with the
last of them.

A workspace runs calls of any number of rows, so whatever is asked for later is served by the one that is there, if that
has at least the memory that one of its own would have. All ranks have to find the same, so each says what it has found
(`Shared.ticket`), and they share only if all said so (`creation`): garbage may have been collected on one rank alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import torch

from mnnvl_ar.compat import policy
from mnnvl_ar.errors import MnnvlArError
from mnnvl_ar.memory import AnyGroup
from mnnvl_ar.workspace import Workspace

_lock = threading.RLock()  # a finalizer may run in any thread, in this one too
_by_group: WeakKeyDictionary[Any, Shared] = WeakKeyDictionary()
_tickets: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # made over this group so far, alike on its ranks

_Same = TypeVar("_Same", bound="Unique")


class Unique:
    """What is what it is for, not a value, as a `mnnvl_ar.Workspace` is: its copies are itself. Another object would
    give the workspace back once more, and not know that this one has."""

    def __copy__(self: _Same) -> _Same:
        return self

    def __deepcopy__(self: _Same, memo: object) -> _Same:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled, nor sent to another process: its memory is this process's. "
            "Make one there"
        )


class Shared(Unique):
    """workspace: the library's. users: how many still hold it."""

    def __init__(self, workspace: Workspace, group: Any) -> None:
        self.workspace, self.users, self.ticket, self._asleep = workspace, 0, 0, False
        with _lock, contextlib.suppress(TypeError):  # a group that nobody can refer to weakly is not remembered
            self.ticket = _tickets[group] = _tickets.get(group, 0) + 1
            _by_group[group] = self

    @staticmethod
    @contextlib.contextmanager
    def of(group: Any, tokens: int, hidden: int, dtype: torch.dtype) -> Iterator[Shared | None]:
        """The one over `group` if it is sound, awake, and as large as one of its own would be. Held as long."""
        found = None
        with _lock, contextlib.suppress(TypeError):
            found = _by_group.get(group)
            if found is not None:
                found = found.take() if found.users else None
        try:
            yield found if found is not None and found._serves(tokens, hidden, dtype) else None
        finally:
            if found is not None:
                found.give_back()

    def _serves(self, tokens: int, hidden: int, dtype: torch.dtype) -> bool:
        ours = self.workspace
        if self._asleep:
            return False
        try:
            ours.check()
        except MnnvlArError:
            return False
        needed = Workspace.bytes_for(ours.world_size, tokens, hidden, dtype, device=ours.device)
        return needed <= ours.nbytes and ours.fits(tokens, hidden, dtype)

    def take(self) -> Shared:
        with _lock:
            self.users += 1
        return self

    def give_back(self) -> None:
        with _lock:
            self.users -= 1
            last = self.users == 0
        if last:
            self.workspace.close()

    def sleep(self) -> None:
        """Of several users the first puts it to sleep, and the first to come back wakes it. Asleep it may be although
        this raises, since other ranks are late."""
        try:
            self.workspace.checkpoint_prepare()
        finally:
            self._asleep = self.workspace.is_asleep

    def wake(self, group: AnyGroup, timeout: float) -> None:
        if self._asleep:
            self.workspace.wake(group, timeout)
            self._asleep = False
            policy.obey(self.workspace)
