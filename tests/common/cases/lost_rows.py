"""What is said of rows that do not come, by a rank that has signed the call. Where own rows come, too, the peer's stand
elsewhere in the slot: looked for in the wrong place, they would seem to be there, and nobody would be named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

HIDDEN = 8  # of fp32: two vectors


def check_lost_rows(rank: Any, late: bool = False) -> None:
    """Run by a rank that is alone, and makes a group of two. Its peer signs, and sends nothing. The control, on a GPU:
    `late`, when the call has been given up, the peer's rows are there, behind our own; then nobody is named."""
    import mnnvl_ar
    from mnnvl_ar._library import named
    from mnnvl_ar.diagnosis import raise_fault

    layout = named(torch.ops.mnnvl_ar._block_layout, 0)
    board, slot = layout["board_offset"] // 4, layout["control_bytes"] // 4
    alone = _group(rank)  # no peer signs; where ours is to, stands what we have signed
    _call(rank, alone)
    signature = alone.blocks[1][board : board + 4].clone()
    alone.close()
    group = _group(rank)
    block = group.blocks[0]
    block[board + 4 : board + 8] = signature
    _call(rank, group)
    if late:
        block[slot + HIDDEN : slot + 2 * HIDDEN] = 1
        rank.synchronize()
    with pytest.raises(mnnvl_ar.PeerTimeout) as found:
        raise_fault(group.handles[0])
    group.close()
    assert found.value.peer == (-1 if late else 1), str(found.value)


def _group(rank: Any) -> Any:
    from common.virtual import VirtualGroup

    options = {"deadline": 0.3, "multicast": rank.multicast}
    return VirtualGroup(2, 1, HIDDEN, torch.float32, str(rank.device), **options)


def _call(rank: Any, group: Any) -> None:
    """Of rank 0, which gives it up."""
    from mnnvl_ar import ops

    x = torch.ones(1, HIDDEN, device=rank.device)
    out = torch.zeros_like(x)
    rank.synchronize()
    try:
        ops.all_reduce_out(x, out, group.handles[0], strategy=0)
    except RuntimeError:  # a GPU stores NaN
        assert rank.device.type == "cpu"
    rank.synchronize()
    assert bool(out.isnan().all())
