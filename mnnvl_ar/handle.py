"""Workspaces as C++ knows them: what their blocks hold at first, and the handle of blocks that are mapped."""

from __future__ import annotations

from dataclasses import asdict

import torch

from mnnvl_ar._library import named, ops
from mnnvl_ar.memory import Fill
from mnnvl_ar.ops import Pdl, Strategy
from mnnvl_ar.tuning import LaunchShape, Table, link_for

# Seconds. Ranks of a server may honestly be minutes apart while they compile or capture (172 s were seen), and servers
# give up on a step after 300 s (vLLM, SGLang), without naming a rank.
DEFAULT_DEADLINE = 200.0


def nanoseconds(deadline: float | None) -> int:
    """As the ops take a deadline: 0 for none."""
    return 0 if deadline is None else max(1, round(deadline * 1e9))


class Layout:
    """The block of a workspace whose slots have `slot_bytes`: its size, and what it holds before the first call."""

    def __init__(self, slot_bytes: int) -> None:
        block, canaries = named(ops._block_layout, slot_bytes), named(ops._block_canaries)
        self.nbytes: int = block["nbytes"]
        self.probe_offset: int = block["probe_offset"]
        control = block["control_bytes"]
        areas = zip(canaries["offsets"], canaries["nbytes"], strict=True)
        self.fills = (
            Fill(0, control, 0),
            Fill(block["board_offset"], block["board_bytes"], block["no_epoch"]),
            *(Fill(offset, nbytes, canaries["word"]) for offset, nbytes in areas),
            Fill(control, self.nbytes - control, block["sentinel"]),
        )
        # A block that is no more: a call that comes to it ends at once, with NaN, and its record says so.
        self.asleep = (*self.fills[:-1], Fill(block["broken_offset"], 4, block["asleep"]))


def create(
    pointers: tuple[int, ...],
    rank: int,
    device: torch.device,
    slot_bytes: int,
    table: Table,
    *,
    multicast_pointer: int = 0,
    strategy: int = Strategy.AUTO,
    pdl: int = Pdl.EARLY,
    deadline: float | None = DEFAULT_DEADLINE,
    hold: float = 0.0,
    launch: LaunchShape | None = None,
    concurrent: bool = True,
) -> int:
    """Makes a handle for blocks that are mapped and filled (`Layout`); `Workspace` without the memory.

    `table` is what "auto" goes by; all ranks have the same. Of its launch shapes, the figures of `launch` that are not
    0 replace the table's.
    """
    return int(
        ops._workspace_create(
            rank,
            list(pointers),
            multicast_pointer,
            slot_bytes,
            -1 if device.type == "cpu" else device.index,
            deadline_ns=nanoseconds(deadline),
            hold_ns=round(hold * 1e9),
            strategy=strategy,
            pdl=pdl,
            **asdict(launch or LaunchShape()),
            concurrent=concurrent,
            **table.columns(),
            **link_for(device).columns(),
        )
    )
