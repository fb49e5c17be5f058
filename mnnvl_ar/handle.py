"""Workspaces as C++ knows them: what their blocks hold at first, and the handle of blocks that are mapped."""

from __future__ import annotations

import torch

from mnnvl_ar._library import ops
from mnnvl_ar.memory import Fill
from mnnvl_ar.ops import Pdl, Strategy
from mnnvl_ar.tuning import Table

# Seconds. Ranks of a server may honestly be minutes apart while they compile or capture (172 s were seen), and servers
# give up on a step after 300 s (vLLM, SGLang), without naming a rank.
DEFAULT_DEADLINE = 200.0


class Layout:
    """The block of a workspace whose slots have `slot_bytes`: its size, and what it holds before the first call."""

    def __init__(self, slot_bytes: int) -> None:
        nbytes, control, board, board_bytes, probe, sentinel, no_epoch, _ = ops._block_layout(slot_bytes)
        self.nbytes: int = nbytes
        self.probe_offset: int = probe
        canary, *areas = ops._block_canaries()
        self.fills = (
            Fill(0, control, 0),
            Fill(board, board_bytes, no_epoch),
            *(Fill(offset, nbytes, canary) for offset, nbytes in zip(areas[::2], areas[1::2], strict=True)),
            Fill(control, nbytes - control, sentinel),
        )


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
    cluster: int = 0,
    max_ctas: int = 0,
    batch: int = 0,
    lag: int = 0,
    concurrent: bool = True,
) -> int:
    """Makes a handle for blocks that are mapped and filled (`Layout`); `Workspace` without the memory.

    `table` is what "auto" goes by; all ranks have the same. Of its launch shapes cluster, max_ctas, batch and lag
    replace the figure where they are not 0.
    """
    deadline_ns = 0 if deadline is None else max(1, round(deadline * 1e9))
    index = -1 if device.type == "cpu" else device.index
    settings = [index, rank, slot_bytes, deadline_ns, strategy, pdl]
    settings += [cluster, max_ctas, batch, lag, int(concurrent)]
    return int(ops._workspace_create(settings, list(pointers), multicast_pointer, table.flat()))
