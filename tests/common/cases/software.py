"""Software multicast (tests/common/virtual.py) as tests use it: virtual ranks of one GPU, and real ones, one a GPU.

    SoftwareRanks(4).run(check_calls, calls, WORKSPACE)         # as VirtualRanks' run, in a process of a test build
    pool.run(by_software, check_calls, calls, WORKSPACE)        # real ranks, of a test build

Contract
  * Virtual ranks live in one process of the session, which keeps them; fails(says, ...) wants a run to fail with that
    text, there.
  * Real ranks' workspaces are made over unicast memory, with slots that have room for own rows. The kernels are then
    given the rank's own block for the address of a multicast, so all that goes to all ranks goes as by a multicast,
    over NVLink. What unicast cannot do is left to hardware: `transport` still says "unicast".
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

from common.ranks import TEST_LIBRARY, Rank, RanksFailed, rank_pool

_kept: dict[tuple[int, str], Any] = {}  # in the process of the virtual ranks


def in_virtual_ranks(
    rank: Any,
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    multicast: str = "software",
    says: str = "",
    **named: Any,
) -> None:
    """Run by a single process, which makes its virtual ranks itself, and keeps them. says: what it must fail with."""
    from common.virtual_ranks import VirtualRanks

    if (world_size, multicast) not in _kept:
        _kept[world_size, multicast] = VirtualRanks(world_size, multicast=multicast)
    expect_failure(says, _kept[world_size, multicast].run, function, *arguments, timeout=60, **named)


def expect_failure(says: str, run: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """With `says`, the run must fail, and say that."""
    if not says:
        run(*arguments, **named)
        return
    with pytest.raises(RanksFailed, match=says):
        run(*arguments, **named)


@dataclass(frozen=True)
class SoftwareRanks:
    world_size: int
    multicast: str = "software"

    def run(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        self.fails("", function, *arguments, **named)

    def fails(self, says: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        pool = rank_pool(1, "cuda", library=TEST_LIBRARY)
        choice = {"multicast": self.multicast, "says": says}
        pool.run(in_virtual_ranks, self.world_size, function, *arguments, timeout=90, **choice, **named)


class SoftwareRank(Rank):
    """A real rank whose workspaces go by software multicast. Made of a `Rank` by `by_software`."""

    multicast = "software"  # or "", the control: the same slots, but sent to by unicast

    def workspace(self, *arguments: Any, **options: Any) -> Any:
        # The pool may keep others that are alike, of tests of unicast.
        key = repr(("software", self.multicast, arguments, sorted(options.items())))
        if key not in self._workspaces:
            self._workspaces[key] = self.new_workspace(*arguments, **options)
        return self._workspaces[key]

    def new_workspace(self, *arguments: Any, **options: Any) -> Any:
        import mnnvl_ar.workspace as module

        make, slots = module.create, list[int]()

        def create(pointers: tuple[int, ...], rank: int, device: Any, slot_bytes: int, *rest: Any, **named: Any) -> int:
            slots.append(slot_bytes)
            if self.multicast:
                named["multicast_pointer"] = pointers[rank]
            return make(pointers, rank, device, slot_bytes, *rest, **named)

        with mock.patch.object(module, "create", create):
            made = super().new_workspace(*arguments, **options)
        made.group = OwnBlock(made, module.Layout(*slots))
        return made


class OwnBlock:
    """What `VirtualGroup` tells of blocks, of a real rank's own."""

    def __init__(self, workspace: Any, layout: Any) -> None:
        self.workspace, self.layout = workspace, layout

    @property
    def blocks(self) -> dict[int, torch.Tensor]:
        """A copy, of this moment."""
        memory = self.workspace._memory
        read = memory._block.driver.read(memory.pointers[memory.rank], self.layout.nbytes)
        return {memory.rank: torch.frombuffer(bytearray(read), dtype=torch.int32)}


def by_software(rank: Rank, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run by real ranks of a test build."""
    return function(_as_software(rank), *arguments, **named)


def by_unicast(rank: Rank, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The control of `by_software`."""
    other = _as_software(rank)
    other.multicast = ""
    return function(other, *arguments, **named)


def _as_software(rank: Rank) -> SoftwareRank:
    assert hasattr(torch.ops.mnnvl_ar, "_sabotage"), "software multicast takes a test build"
    other = copy.copy(rank)
    other.__class__ = SoftwareRank
    assert isinstance(other, SoftwareRank)
    return other
