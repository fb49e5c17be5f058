"""Many calls of mixed sizes, ops and strategies, back to back, on several workspaces."""

from __future__ import annotations

import random
from typing import Any

import torch

from common.cases.calls import Call, Prepared, check_calls, wanted

KEEPS_INPUTS = ("", "E")


def palette(
    count: int, seed: int, *, hiddens: tuple[int, ...], most_tokens: int, pdls: tuple[int, ...] = (-1,)
) -> list[Call]:
    """Calls that can be repeated, since they keep their inputs; no two of the same seed."""
    draw = random.Random(seed)
    return [
        Call(
            op=draw.choice(("all_reduce", "all_reduce_rms_norm")),
            tokens=draw.choice([t for t in (1, 1, 2, 3, 5, 8, 13, 16, 32, 64) if t <= most_tokens]),
            hidden=draw.choice(hiddens),
            dtype=draw.choice(("bf16", "bf16", "fp16", "fp32")),
            out=draw.choice(KEEPS_INPUTS),
            strategy=draw.choice((-1, 0, 1)),
            pdl=draw.choice(pdls),
            seed=1000 * seed + number,
        )
        for number in range(count)
    ]


def same_on_device(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """`reference.same_bits` without leaving the device."""
    integer = torch.int16 if got.element_size() == 2 else torch.int32
    return ((got.view(integer) == want.view(integer)) | (got.isnan() & want.isnan())).all()


def check_traffic(rank: Any, calls: int, workspaces: list[dict[str, Any]], seed: int = 0, **sizes: Any) -> int:
    """`calls` random picks from a palette, each on a random one of the workspaces; every output is compared."""
    handles = [rank.workspace(**options).handle for options in workspaces]
    prepared = [Prepared(rank, call) for call in palette(24, seed, **sizes)]
    answers = [[w.to(rank.device) for w in wanted(each.call, rank.world_size)] for each in prepared]
    for want in answers:  # loads the kernels of the comparison, while nobody waits
        same_on_device(want[0].clone(), want[0])
    draw = random.Random(seed)
    rank.barrier()
    for number in range(calls):
        pick, handle = draw.randrange(len(prepared)), draw.choice(handles)
        prepared[pick].launch(handle)
        good = all(same_on_device(g, w) for g, w in zip(prepared[pick].outputs, answers[pick], strict=True))
        assert good, f"call {number} on workspace {handle}: {prepared[pick].wrong()}"
    return calls


def check_groups(rank: Any, calls: list[Call]) -> int:
    """Workspaces over all ranks, over some of them in overlapping groups, and twice over the same, used in turn."""
    last = rank.world_size - 1
    parts = [rank.within(members) for members in ([0, last], list(range(1, last + 1)), list(range(rank.world_size)))]
    contexts = [rank, *[part for part in parts if part is not None]]
    made = 0
    for call in calls:
        for context in contexts:
            made += check_calls(context, [call])
            made += check_calls(context, [call], {"hidden": 4096, "max_tokens": 32})
    for part in contexts[1:]:
        part.forget_workspaces()
    return made


def check_epochs(rank: Any, first: int, count: int, workspace: dict[str, Any]) -> None:
    """Calls whose numbers begin near `first`, a multiple of three: with 2^32 - 4 they go across the wrap."""
    made = rank.new_workspace(**workspace)
    rank.barrier()
    rank.set_epoch(made, first)  # a fresh workspace is at 0: the same slot
    rank.barrier()
    calls = palette(count, 5, hiddens=(64, 2880), most_tokens=16)
    check_calls(rank, calls, handle=made.handle)
    rank.barrier()
    made.close()
