"""The result of a bring-up: `SymmetricMemory`, and `allocate`, which makes one."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..errors import MnnvlArError
from . import parting
from .block import Block, Undo
from .bringup import BringUp, Use
from .cuda_driver import CudaDriver
from .failures import Refusals
from .group import AnyGroup, Members
from .host_driver import HostDriver
from .lifeline import ASLEEP, CLOSED, RECOVERS, Lifeline
from .rendezvous import meet
from .request import Fill, Request
from .verbs import Verbs


class SymmetricMemory:
    """One block of memory on every rank of a group, each mapped into every rank. Made by `allocate`.

    rank, world_size:  ours in the group it was made over.
    nbytes:            mapped size of one block; at least what was asked for.
    pointers:          address in this process of each rank's block, by group rank; pointers[rank] is our own.
    multicast_pointer: address at which a store reaches every block; 0 if there is none.
    transport:         "host", "unicast" or "multicast".
    handle_kind:       "memfd", "posix_fd" or "fabric".
    reason:            one line: which transport, and why not a better one.
    processors:        SMs that each rank's calls may count on, the same on all ranks; 0 on the host.
    lifeline:          by which peers know, and tell, who is gone; a new one after `restore`.
    stand_in:          says what the first bytes of each block are to hold while the memory is gone but something may
                       still come to its addresses; nothing by default: then nothing is mapped there. To be set by
                       whoever knows.

    The caller sees to it that nothing on this rank uses the memory any more when it calls `close` or `drop`. Peers may:
    a block's memory lives until the last rank that maps it lets it go and, bound to a multicast object, until all ranks
    have closed or dropped theirs (`parting.py`). A forked child has no part in any of it.
    """

    def __init__(self, block: Block, made: BringUp, lifeline: Lifeline) -> None:
        self.lifeline = lifeline
        self._block, self._request, self._pid = block, made.request, os.getpid()
        self._closed = self._is_dropping = False
        self.stand_in: Callable[[], Sequence[Fill]] = tuple
        self.rank, self.world_size, self.nbytes = block.rank, block.world_size, block.stride
        self.pointers, self.multicast_pointer = block.pointers, block.multicast_pointer
        self.transport, self.reason, self.handle_kind = made.transport, made.reason, block.kind
        self.processors = made.processors

    def close(self) -> None:
        """Gives everything back. Idempotent, not collective, never raises; fine after the group is gone and at exit.
        Bound to a multicast object, memory goes once all ranks have left, in a thread."""
        if self._closed or os.getpid() != self._pid:
            return
        if not self._block.is_exposed:
            self.lifeline.leave(CLOSED)
        self._part(self._block.close(), CLOSED)
        self._closed = True  # last: where a signal's handler raises before, it is to be closed once more

    def drop(self, how: int = ASLEEP) -> None:
        """Gives the physical memory back and keeps the addresses. Idempotent, not collective. Touching them then
        faults, unless something stands in (`stand_in`). `how` is what peers are told (`lifeline.Gone`). Bound to a
        multicast object, memory goes once all ranks have left, in a thread."""
        self._check_usable("drop")
        if not self._block.is_exposed:
            self.lifeline.leave(how)
        if not self.is_dropped or self._is_dropping:  # or it was cut short
            self._is_dropping = True
            self._drop(how)
            self._is_dropping = False

    def _drop(self, how: int) -> None:
        left = self._block.drop()
        fills = self.stand_in()
        if fills:
            self._block.stand_in(fills)
        self._part(left, how)

    def _part(self, left: Undo | None, how: int) -> None:
        """No address of ours leads to the multicast any more: now peers may know. `left`: what they may still send
        to."""
        if left is not None:
            self.lifeline.leave(how, stay=True)
            parting.keep(self._block, self.lifeline, functools.partial(self._block.give_back, left))
        parting.look()

    def await_parting(self, seconds: float) -> list[int]:
        """Of memory that was dropped or closed: waits until it is given back. Returns the ranks that have not left by
        then."""
        return parting.wait(self._block, seconds)

    def restore(self, group: AnyGroup, timeout: float = 60.0, quiesce: Callable[[], object] | None = None) -> None:
        """New memory with its initial content, at the same addresses. Collective over `group`, which may be a new one
        with the same ranks. Raises `BringUpError` on all ranks alike; it may then be tried again, or closed.

        `quiesce` is called first, to end all use of the memory on this rank. If it raises, the memory here stays as it
        is, and it is a failure of all ranks like any other.
        """
        self._check_usable("restore")
        members = Members(group)
        if (members.rank, members.size) != (self.rank, self.world_size):
            got, wanted = f"rank {members.rank} of {members.size}", f"rank {self.rank} of {self.world_size}"
            raise ValueError(f"restore: got a group in which this is {got}, wanted {wanted}")
        with members.alone():
            self._restore(members, timeout, quiesce)

    def _restore(self, members: Members, timeout: float, quiesce: Callable[[], object] | None) -> None:
        trouble: Exception | None = None
        try:
            if quiesce is not None:
                quiesce()
            self.drop(RECOVERS)
        except Exception as error:
            trouble = error

        def prepare() -> Request:
            if trouble is not None:
                raise trouble
            # Graphs hold the multicast address or they do not, so what was chosen then is what is wanted now.
            return replace(self._request, purpose="restore", nbytes=self.nbytes, transport=self.transport)

        # All that matters has worked once. A refusal now is news, not a property of the machine, and is forgotten.
        try:
            met = functools.partial(parting.settle, self._block)
            made, lifeline = _bring_up(self._block, members, timeout, prepare, Refusals(), met=met)
        except BaseException:
            if trouble is None:
                self._drop(RECOVERS)
            raise
        lifeline.next_epoch, self.lifeline = self.lifeline.next_epoch, lifeline
        self.transport, self.reason, self.handle_kind = made.transport, made.reason, self._block.kind
        self.processors = made.processors

    @property
    def is_dropped(self) -> bool:
        """Whether there is no memory at the addresses now, or one that stands in."""
        return not self._block.handle

    def _check_usable(self, verb: str) -> None:
        if os.getpid() != self._pid:
            raise MnnvlArError(f"{verb}: this symmetric memory belongs to the parent of this forked process")
        if self._closed:
            raise MnnvlArError(f"{verb}: this symmetric memory is closed")


def allocate(
    group: AnyGroup,
    request: Request | Callable[[], Request],
    *,
    timeout: float = 60.0,
    use: Use | None = None,
    driver: Verbs | None = None,
) -> SymmetricMemory:
    """Makes what `request` says on every rank of `group`. Collective.

    request: a `Request`, or what makes it, for a rank whose need depends on its machine (files, the device), so that
             finding it out may fail here alone. That is run in the first voted step: whatever it raises is every rank's
             `BringUpError` at once.
    timeout: seconds for all of it, waiting for late ranks included, but for the wait in a `Group`'s all-gather.
    use:     called last, with the pointers and the multicast pointer, to make what the memory is for; a failure in it
             is voted on like any other, so it fails on all ranks or on none. Returns what undoes it.
    driver:  for tests; the one that fits the device if None.

    Raises `BringUpError`, alike on every surviving rank, within `timeout`; then nothing is left behind, but what a rank
    that did not answer may still send to through a multicast, until it is known to have given up. `ValueError` on a
    process that is not in the group.
    """
    members = Members(group)
    block = Block(members.rank, members.size)

    def prepare() -> Request:
        asked = request() if callable(request) else request
        asked = replace(asked, device=_with_index(asked.device))
        block.driver = driver or (HostDriver() if asked.device.type == "cpu" else CudaDriver())
        return asked

    parting.look()
    brought_up: tuple[BringUp, Lifeline] | None = None
    try:
        with members.alone():
            brought_up = _bring_up(block, members, timeout, prepare, Refusals.of(group), use)
            return SymmetricMemory(block, *brought_up)
    except BaseException:
        if brought_up is not None:  # a signal's handler has raised: peers have the memory
            made, lifeline = brought_up
            made.undo()
            lifeline.leave(CLOSED)
        block.close()
        raise


def _bring_up(
    block: Block,
    members: Members,
    timeout: float,
    prepare: Callable[[], Request],
    refused: Refusals,
    use: Use | None = None,
    met: Callable[[], object] | None = None,
) -> tuple[BringUp, Lifeline]:
    with contextlib.closing(meet(members, timeout)) as voter:
        bring_up = BringUp(block, voter, prepare, refused, use, met)
        try:
            bring_up.run()
        except BaseException:
            if block.is_exposed and not bring_up.in_use:
                left = block.drop()
                lifeline = Lifeline(members.rank, members.size, voter.hand_over(), voter.last_words)
                lifeline.leave(CLOSED, stay=True)
                if left is not None:
                    parting.keep(block, lifeline, functools.partial(block.give_back, left))
            raise
        return bring_up, Lifeline(members.rank, members.size, voter.hand_over())


def _with_index(device: torch.device) -> torch.device:
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())
