"""Where one-shot's rows lie in a slot: with multicast, a rank's own among them. So it shows which way was taken."""

from __future__ import annotations

from typing import Any

import torch

TOKENS, HIDDEN = 2, 64


def rows_in_slot(rank: Any) -> list[list[float]]:
    """Of virtual ranks: every rank sends its number, plus one, and what this rank then finds in its slot is returned,
    row by row, up to the first that is empty."""
    import mnnvl_ar

    workspace = rank.new_workspace(TOKENS, HIDDEN, strategy="one_shot")
    x = torch.full((TOKENS, HIDDEN), rank.rank + 1.0, device=rank.device)
    got = mnnvl_ar.ops.all_reduce(x, workspace.handle, strategy=0)
    rank.barrier()  # all have sent, to themselves too; nobody clears this slot before the next call
    block = workspace.group.blocks[rank.rank].cpu()
    workspace.check()
    workspace.close()
    assert torch.equal(got.cpu(), torch.full((TOKENS, HIDDEN), sum(range(1, rank.world_size + 1)) + 0.0))
    slot = block[workspace.group.layout.fills[-1].offset // 4 :]
    rows: list[list[float]] = []
    for row in slot[: (rank.world_size + 1) * TOKENS * HIDDEN].split(HIDDEN):
        if (row == -(1 << 31)).any():
            break
        rows.append(row.view(torch.float32).unique().tolist())
    return rows


def check_own_rows(rank: Any) -> None:
    """All ranks' rows, our own in their place: what a multicast leaves, and no unicast."""
    assert rows_in_slot(rank) == [[source + 1.0] for source in range(rank.world_size) for _ in range(TOKENS)]
