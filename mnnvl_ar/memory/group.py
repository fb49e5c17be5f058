"""The ranks of a group, however they were launched: all that bring-up needs of a group is a rank, a size, and a way for
rank 0 to make known where it can be reached.

A `torch.distributed` process group has that in its store, and no collective runs on it. Any other launcher has it if it
can gather one short text from all ranks: `Group` is that, and no more. A communicator as mpi4py has it, and as
FlashInfer's `CommBackend` repeats it, is taken as it is: `Comm`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias, Union, runtime_checkable
from weakref import WeakKeyDictionary

import torch.distributed as dist


@runtime_checkable
class Group(Protocol):
    """Ranks that any launcher started, for `Workspace` and its `wake` and `recover`.

    rank, size: of this process, from 0; of all.
    all_gather: collective; what every rank gave, by rank, the same on every rank. It is called once a bring-up, in the
                thread that makes the workspace, with at most some kilobytes of ASCII. It is the only wait that is not
                bounded by us: a rank that does not come is noticed by whatever its launcher has for that. From then on
                ranks talk over sockets of our own, with our time limits.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_gather(self, text: str) -> Sequence[str]: ...


class Comm(Protocol):
    """The part of an MPI communicator that makes it a group: mpi4py's `Comm`, FlashInfer's `CommBackend`."""

    def Get_rank(self) -> int: ...

    def Get_size(self) -> int: ...

    def allgather(self, data: Any, /) -> Any: ...


AnyGroup: TypeAlias = Union[dist.ProcessGroup, Group, Comm]  # noqa: UP007  # a protocol has no | at run time


class Members:
    """A group's ranks alike, whatever kind of group it is. `group` is what was given."""

    def __init__(self, group: AnyGroup) -> None:
        """`ValueError` for what is no group, and for a process group that this process is not in."""
        self.group = group
        if isinstance(group, dist.ProcessGroup):
            self.rank, self.size = group.rank(), group.size()
        elif all(callable(getattr(group, name, None)) for name in ("Get_rank", "Get_size", "allgather")):
            self.rank, self.size = group.Get_rank(), group.Get_size()  # type: ignore[union-attr]
        elif all(hasattr(group, name) for name in ("rank", "size", "all_gather")):  # a proxy, too
            self.rank, self.size = group.rank, group.size  # type: ignore[union-attr]
        else:
            wanted = "a process group that this process is a member of, a mnnvl_ar.Group, or an MPI communicator"
            raise ValueError(f"group: is {group!r}, wanted {wanted}")
        if not (isinstance(self.rank, int) and isinstance(self.size, int) and 0 <= self.rank < self.size):
            raise ValueError(f"group: has rank {self.rank!r} of {self.size!r}, wanted one from 0 to size - 1")
        self._is_alone, self._mine = False, set[str]()

    @property
    def name(self) -> str:
        """As PyTorch knows the group, or what it is."""
        if isinstance(self.group, dist.ProcessGroup):
            with contextlib.suppress(RuntimeError):
                return self.group.group_name
        return type(self.group).__name__

    def all_gather(self, text: str) -> Sequence[str]:
        """Of what is no process group, which has a store instead."""
        group: Any = self.group
        gathered: Sequence[str] = (group.allgather if hasattr(group, "allgather") else group.all_gather)(text)
        return gathered

    def who(self) -> dict[str, Any]:
        """What ranks of one group must agree on before they share anything: the group's name and members, as far as
        PyTorch knows them, and the random name that its ranks gave it in their first bring-up: empty before that, "?"
        if the last one ended without."""
        if not isinstance(self.group, dist.ProcessGroup):
            return {}  # its all-gather is the proof
        name, members = "", list[int]()
        with contextlib.suppress(RuntimeError):  # it was not named
            name = self.group.group_name
        with contextlib.suppress(KeyError, ValueError, RuntimeError):  # PyTorch does not know it
            members = dist.get_process_group_ranks(self.group)
        return {"name": name, "members": members, "met": _met.get(self.group, "")}

    def meets(self, name: str) -> None:
        """Notes the random name, or "?" when a bring-up begins."""
        if isinstance(self.group, dist.ProcessGroup) and (name != "?" or self.group not in _met):
            _met[self.group] = name

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread of this process brings anything up over this group, or as this rank over its store,
        meanwhile. `ValueError` if one does."""
        held: list[Any] = [self.group]  # while it is held, no other object has its id
        with contextlib.suppress(AttributeError, RuntimeError):
            held.append(self.group.get_group_store())  # type: ignore[union-attr]
        keys = {(id(each), self.rank, os.getpid()) for each in held}
        mine = False
        try:
            with _lock:
                if keys & _busy:
                    taken = "group: another thread of this process is in a bring-up over it; one after the other"
                    raise ValueError(taken)
                mine = True  # before it is: whatever a signal's handler raises, what is taken is given back
                _busy.update(keys)
            self._is_alone = True
            yield
        finally:
            if mine:
                self._is_alone = False
                with _lock:
                    _busy.difference_update(keys)
                    _under_way.difference_update(self._mine)

    def begins(self, attempt: str) -> None:
        """Of a bring-up that is `alone`: it is under way until then."""
        if self._is_alone:
            with _lock:
                self._mine.add(attempt)
                _under_way.add(attempt)

    def is_of_another(self, attempt: str) -> bool:
        """Whether a bring-up of this process, and not of these members, has begun it and is still under way."""
        with _lock:
            return attempt in _under_way and attempt not in self._mine


_met: WeakKeyDictionary[dist.ProcessGroup, str] = WeakKeyDictionary()
_busy: set[tuple[int, int, int]] = set()
_under_way: set[str] = set()  # attempts
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # which another thread of the parent may have held
    _busy.clear()  # the parent's
    _under_way.clear()


os.register_at_fork(after_in_child=_after_fork)
