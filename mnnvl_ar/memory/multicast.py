"""NVLink multicast: one address at which a store reaches every rank's block.

A multicast object lives in the NVSwitches, which all users of a machine share; they are few, and a leaked one is
missing for all of them (nccl#2077). So this module refuses, before any driver call, when the environment forbids it,
and refusal on one rank is refusal on all. Order matters: every device is added before any memory is bound (a bind may
wait for that for ever), and all memory is bound before anybody stores (a store to a team with an unbound member is an
error of the context), and a vote lies between each two; memory is unbound before either handle is released, and not
while a rank may still store to it (`parting.py`).

Two sizes: memory is bound in multiples of the MINIMUM granularity, objects and their addresses are multiples of the
RECOMMENDED one, which on an NVL72 is said to be 512 MiB (TensorRT-LLM).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from .block import Block, Handshake
from .verbs import LOST, Token, require_multicast_allowed
from .vote import Outcome, StepFailed, Steps


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


def granularity(steps: Steps, block: Block, nbytes: int, kind: str) -> tuple[int, int]:
    """What the size of memory must be a multiple of, and that of an object. Collective; `StepFailed` on all ranks
    alike."""

    def body() -> Outcome:
        require_multicast_allowed()
        return Outcome(data=block.driver.multicast_granularity(block.world_size, nbytes, kind))

    minimums, recommended = zip(*steps.run("multicast probe", body, needs_peers=True).data, strict=True)
    return max(minimums), max(*minimums, *recommended)


def bring_up(steps: Steps, block: Block, handshake: Handshake, grain: int) -> None:
    """Sets `block.multicast_pointer`, and `block.multicast_span` to a multiple of `grain`. Collective; on `StepFailed`,
    alike on all ranks, `block.drop_multicast()` cleans up if all have voted, else `block.drop()` in time."""
    driver, kind = block.driver, block.kind
    objects: list[int] = []
    if not block.multicast_pointer:  # a restored block still has its address, and that its size
        block.multicast_span = -(-block.stride // grain) * grain

    def keep(handle: int) -> None:
        block.team.push(driver.release, handle)
        objects.append(handle)

    def create() -> Token | None:
        require_multicast_allowed()
        if block.rank != 0:
            return None
        keep(driver.multicast_create(block.world_size, block.multicast_span, kind))
        return driver.export(objects[0], kind)

    def import_() -> None:
        token = tokens[0]
        if token == LOST:
            raise OSError(errno.EMFILE, "no room for the file descriptor of rank 0")
        if block.rank != 0 and token is not None:
            keep(driver.import_(token, kind))

    def bind() -> None:
        driver.multicast_bind(objects[0], block.handle, block.stride)
        block.team.push(driver.multicast_unbind, objects[0], block.stride)

    def map_() -> None:
        if not block.multicast_pointer:
            pointer = driver.reserve(block.multicast_span, grain)
            block.space.push(driver.free, pointer, block.multicast_span)
            block.multicast_pointer = pointer
        driver.map(block.multicast_pointer, block.multicast_span, objects[0])
        block.window.push(driver.unmap, block.multicast_pointer, block.multicast_span)
        block.is_exposed = True  # before we vote: once all have, peers store, and may be sooner than we hear of it

    with steps.exchange("multicast create", create) as tokens:
        steps.run("multicast import", import_)
    steps.run("multicast add device", lambda: driver.multicast_add_device(objects[0]))
    steps.run("multicast bind", bind)
    try:
        steps.run("multicast map", map_)
    except StepFailed as failed:
        # What rank 0 has said all hear, and no rank goes on to store. Where some may have left before that, they take
        # each other for there, and need rank 0 to pass on that they are not.
        if failed.is_announced:
            block.is_exposed = False
        raise
    steps.run("multicast write", handshake.write_multicast)
    block.is_exposed = False  # all have stored their nonce, and nothing else is sent before all are ready
    steps.run("multicast verify", lambda: handshake.verify(through_multicast=True))
