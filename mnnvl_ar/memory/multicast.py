"""NVLink multicast: one address at which a store reaches every rank's block.

A multicast object lives in the NVSwitches, which all users of a machine share; they are few, and a leaked one is
missing for all of them (nccl#2077). So this module refuses, before any driver call, when the environment forbids it,
and refusal on one rank is refusal on all. Order matters: every device is added before any memory is bound (a bind may
wait for that for ever), and a vote lies between the two; memory is unbound before either handle is released.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from .block import Block, Handshake
from .verbs import LOST, Token, require_multicast_allowed
from .vote import Outcome, Steps


def obstacle(members: Sequence[dict[str, Any]]) -> tuple[int, str]:
    """The first rank that cannot or must not do multicast, and why; (-1, "") if nothing speaks against trying."""
    seen: dict[str, int] = {}
    for rank, member in enumerate(members):
        if member["refusal"]:
            return rank, f"multicast is switched off on rank {rank} by {member['refusal']}"
        if not member["multicast"]:
            return rank, f"the device of rank {rank} ({member['name']}) has no multicast"
        if member["uid"] in seen:
            return rank, f"ranks {seen[member['uid']]} and {rank} share a device, which multicast cannot"
        seen[member["uid"]] = rank
    return (-1, "") if len(members) > 1 else (0, "multicast needs more than one rank")


def granularity(steps: Steps, block: Block, nbytes: int, kind: str) -> int:
    """What a block's size must be a multiple of. Collective; `StepFailed` on all ranks alike."""

    def body() -> Outcome:
        require_multicast_allowed()
        return Outcome(data=block.driver.multicast_granularity(block.world_size, nbytes, kind))

    return int(max(steps.run("multicast probe", body, needs_peers=True).data))


def bring_up(steps: Steps, block: Block, handshake: Handshake) -> None:
    """Sets `block.multicast_pointer`. Collective; on `StepFailed`, alike on all ranks, `block.multicast.run()` cleans
    up."""
    driver, stack, kind = block.driver, block.multicast, block.kind
    objects: list[int] = []

    def keep(handle: int) -> None:
        stack.push(driver.release, handle)
        objects.append(handle)

    def create() -> Token | None:
        require_multicast_allowed()
        if block.rank != 0:
            return None
        keep(driver.multicast_create(block.world_size, block.stride, kind))
        return driver.export(objects[0], kind)

    def import_() -> None:
        token = tokens[0]
        if token == LOST:
            raise OSError(errno.EMFILE, "no room for the file descriptor of rank 0")
        if block.rank != 0 and token is not None:
            keep(driver.import_(token, kind))

    def bind() -> None:
        driver.multicast_bind(objects[0], block.handle, block.stride)
        stack.push(driver.multicast_unbind, objects[0], block.stride)

    def map_() -> None:
        if not block.multicast_pointer:  # a restored block still has its address
            pointer = driver.reserve(block.stride, block.alignment)
            block.space.push(driver.free, pointer, block.stride)
            block.multicast_pointer = pointer
        driver.map(block.multicast_pointer, block.stride, objects[0])
        stack.push(driver.unmap, block.multicast_pointer, block.stride)

    with steps.exchange("multicast create", create) as tokens:
        steps.run("multicast import", import_)
    steps.run("multicast add device", lambda: driver.multicast_add_device(objects[0]))
    steps.run("multicast bind", bind)
    steps.run("multicast map", map_)
    steps.run("multicast write", handshake.write_multicast)
    steps.run("multicast verify", lambda: handshake.verify(through_multicast=True))
