"""The ranks of a group, however they were launched: all that bring-up needs of a group is a rank, a size, and a way for
rank 0 to make known where it can be reached.

A `torch.distributed` process group has that in its store, and no collective runs on it. Any other launcher has it if it
can gather one short text from all ranks: `Group` is that, and no more. A communicator as mpi4py has it, and as
FlashInfer's `CommBackend` repeats it, is taken as it is: `Comm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, Union, runtime_checkable

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
        elif isinstance(group, Group):
            self.rank, self.size = group.rank, group.size
        else:
            wanted = "a process group that this process is a member of, a mnnvl_ar.Group, or an MPI communicator"
            raise ValueError(f"group: is {group!r}, wanted {wanted}")
        if not (isinstance(self.rank, int) and isinstance(self.size, int) and 0 <= self.rank < self.size):
            raise ValueError(f"group: has rank {self.rank!r} of {self.size!r}, wanted one from 0 to size - 1")

    def all_gather(self, text: str) -> Sequence[str]:
        """Of what is no process group, which has a store instead."""
        group: Any = self.group
        gathered: Sequence[str] = (group.allgather if hasattr(group, "allgather") else group.all_gather)(text)
        return gathered
