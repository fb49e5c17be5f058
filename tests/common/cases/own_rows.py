"""Where one-shot's rows lie in a slot: with multicast, a rank's own among them. So it shows which way was taken. And
that a call on a workspace that sleeps sends none."""

from __future__ import annotations

import contextlib
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


def check_nothing_is_sent(rank: Any, asleep: bool) -> None:
    """Rank 0 alone makes calls, in both strategies, on a block whose control words are those of one that sleeps: no
    slot and no board of any block is stored to. The control is awake, and gives up waiting for the others, if there are
    any."""
    import mnnvl_ar

    workspace = rank.new_workspace(TOKENS, HIDDEN, deadline=0.5)
    group = workspace.group
    if rank.rank == 0:
        slots = group.layout.fills[-1].offset // 4
        if asleep:
            mark = group.layout.asleep[-1]
            group.blocks[0][mark.offset // 4] = mark.word
        rank.synchronize()
        before = [block.cpu().clone() for block in group.blocks]
        x = torch.ones(TOKENS, HIDDEN, device=rank.device)
        for strategy in (0, 1):
            with contextlib.suppress(RuntimeError):  # the host transport raises, a GPU stores NaN
                out = mnnvl_ar.ops.all_reduce(x, workspace.handle, strategy=strategy)
                waits_for_nobody = not asleep and rank.world_size == 1
                assert torch.equal(out, x) if waits_for_nobody else bool(out.isnan().all())
            rank.synchronize()
        signed = group.layout.fills[1]
        boards = slice(signed.offset // 4, (signed.offset + signed.nbytes) // 4)
        for number, (block, old) in enumerate(zip(group.blocks, before, strict=True)):
            new = block.cpu()
            same = torch.equal(new[slots:], old[slots:]) and torch.equal(new[boards], old[boards])
            assert same, f"the block of rank {number} was stored to"
    rank.barrier()
    workspace.close()
