"""The result of a bring-up: `SymmetricMemory`, and `allocate`, which makes one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from ..errors import MnnvlArError
from . import refusals
from .block import Block, Fill
from .bringup import BringUp, Use
from .host import HostDriver
from .refusals import Refusals
from .rendezvous import meet
from .request import Need, Request
from .verbs import Verbs

_log = logging.getLogger("mnnvl_ar")


class SymmetricMemory:
    """One block of memory on every rank of a group, each mapped into every rank. Made by `allocate`.

    rank, world_size:  ours in the group it was made over.
    nbytes:            mapped size of one block; at least what was asked for.
    pointers:          address in this process of each rank's block, by group rank; pointers[rank] is our own.
    multicast_pointer: address at which a store reaches every block; 0 if there is none.
    transport:         "host", "unicast" or "multicast".
    handle_kind:       "memfd", "posix_fd" or "fabric".
    reason:            one line: which transport, and why not a better one.

    The caller sees to it that nothing on this rank uses the memory any more when it calls `close` or `drop`. Peers may:
    a block's memory lives until the last rank that maps it lets it go. A forked child has no part in any of it.
    """

    def __init__(self, block: Block, request: Request, transport: str, reason: str) -> None:
        self._block, self._request, self._pid = block, request, os.getpid()
        self._closed = False
        self.rank, self.world_size, self.nbytes = block.rank, block.world_size, block.stride
        self.pointers, self.multicast_pointer = block.pointers, block.multicast_pointer
        self.transport, self.reason, self.handle_kind = transport, reason, block.kind

    def close(self) -> None:
        """Gives everything back. Idempotent, not collective, never raises; fine after the group is gone and at exit."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._block.close()

    def drop(self) -> None:
        """Gives the physical memory back and keeps the addresses. Idempotent, not collective. Touching them then
        faults.
        """
        self._check_usable("drop")
        self._block.drop()

    def restore(
        self, group: dist.ProcessGroup, timeout: float = 60.0, quiesce: Callable[[], object] | None = None
    ) -> None:
        """New memory with its initial content, at the same addresses. Collective over `group`, which may be a new one
        with the same ranks. Raises `BringUpError` on all ranks alike; it may then be tried again, or closed.

        `quiesce` is called first, to end all use of the memory on this rank. If it raises, the memory here stays as it
        is, and it is a failure of all ranks like any other.
        """
        self._check_usable("restore")
        if (group.rank(), group.size()) != (self.rank, self.world_size):
            got, wanted = f"rank {group.rank()} of {group.size()}", f"rank {self.rank} of {self.world_size}"
            raise ValueError(f"restore: got a group in which this is {got}, wanted {wanted}")
        trouble: Exception | None = None
        try:
            if quiesce is not None:
                quiesce()
            self.drop()
        except Exception as error:
            trouble = error

        def prepare() -> Request:
            if trouble is not None:
                raise trouble
            return self._request_again()

        # All that matters has worked once. A refusal now is news, not a property of the machine, and is forgotten.
        try:
            done = _bring_up(self._block, group, timeout, prepare, {})
        except BaseException:
            if trouble is None:
                self._block.drop()
            raise
        self.transport, self.reason, self.handle_kind = done.transport, done.reason, self._block.kind

    def _request_again(self) -> Request:
        # Graphs hold the multicast address or they do not, so what was chosen then is what is wanted now.
        return replace(self._request, purpose="restore", nbytes=self.nbytes, transport=self.transport)

    def _check_usable(self, verb: str) -> None:
        if os.getpid() != self._pid:
            raise MnnvlArError(f"{verb}: this symmetric memory belongs to the parent of this forked process")
        if self._closed:
            raise MnnvlArError(f"{verb}: this symmetric memory is closed")


def allocate(
    group: dist.ProcessGroup,
    nbytes: int,
    fills: Sequence[Fill],
    *,
    probe_offset: int,
    device: torch.device,
    transport: str = "auto",
    timeout: float = 60.0,
    alike: Mapping[str, str] | None = None,
    use: Use | None = None,
    retry: bool = False,
    driver: Verbs | None = None,
) -> SymmetricMemory:
    """Makes `nbytes` of memory on every rank of `group`, each block mapped into all ranks. Collective.

    fills:        initial content, in place before any other rank can see the block. What they leave out is unspecified.
    probe_offset: start (a multiple of 16) of world_size * 16 bytes that the proof of sharing may use; they end up as
    the
                  fills say, or 0.
    device:       "cpu" for the host transport, else this rank's CUDA device, whatever its index.
    transport:    "auto", "host" (cpu), "unicast" or "multicast" (CUDA). Only "auto" falls back; see `reason`.
    timeout:      seconds for all of it, waiting for late ranks included.
    alike:        what else must be equal on all ranks, by name: what the memory is to be used for.
    use:          called last, with the pointers and the multicast pointer, to make what the memory is for; a failure in
                  it is voted on like any other, so it fails on all ranks or on none. Returns what undoes it.
    retry:        try again what the driver refused this group before (a handle kind, multicast), which is remembered
                  otherwise. On one rank it is for all.
    driver:       for tests; the one that fits the device if None.

    Raises `BringUpError`, alike on every surviving rank, within `timeout`; then nothing is left behind. `ValueError` on
    a process that is not in the group.
    """

    def prepare() -> Need:
        return Need(nbytes, tuple(fills), probe_offset, dict(alike or {}))

    return allocate_prepared(
        group, prepare, device=device, transport=transport, timeout=timeout, use=use, retry=retry, driver=driver
    )


def allocate_prepared(
    group: dist.ProcessGroup,
    prepare: Callable[[], Need],
    *,
    device: torch.device,
    transport: str = "auto",
    timeout: float = 60.0,
    use: Use | None = None,
    retry: bool = False,
    driver: Verbs | None = None,
) -> SymmetricMemory:
    """`allocate` for a rank whose need depends on its machine (files, the device), so that finding it out may fail here
    alone. `prepare` is run in the first voted step: whatever it raises is every rank's `BringUpError` at once."""
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group: got {group!r}, wanted a process group that this process is a member of")
    device = torch.device(device)

    def request() -> Request:
        need = prepare()
        place = (device.type, _index(device), transport)
        return Request("allocate", need.nbytes, need.fills, need.probe_offset, *place, need.alike, retry)

    block = Block(driver if driver is not None else _driver_for(device), group.rank(), group.size())
    try:
        done = _bring_up(block, group, timeout, request, refusals.of(group), use)
        memory = SymmetricMemory(block, done.request, done.transport, done.reason)
    except BaseException:
        block.close()
        raise
    if memory.rank == 0:
        _log.info("symmetric memory of %d x %d bytes: %s", memory.world_size, memory.nbytes, memory.reason)
    return memory


def _bring_up(
    block: Block,
    group: dist.ProcessGroup,
    timeout: float,
    prepare: Callable[[], Request],
    refused: Refusals,
    use: Use | None = None,
) -> BringUp:
    ballot = meet(group, timeout)
    try:
        bring_up = BringUp(block, ballot, prepare, refused, use)
        bring_up.run()
        return bring_up
    finally:
        ballot.close()


def _index(device: torch.device) -> int:
    if device.type != "cuda" or device.index is not None:
        return device.index or 0
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _driver_for(device: torch.device) -> Verbs:
    if device.type == "cpu":
        return HostDriver()
    from .driver import Driver

    return Driver()
