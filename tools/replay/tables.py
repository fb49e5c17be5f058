"""Inputs of the replays, and what must come out, bit for bit, as tables of rows on the device.

Row t of set s is row `s * DISTINCT + t % DISTINCT` of every table. Behind the sets come rows of garbage, different on
each rank: the padding of captured graphs. Answers are finite or infinite, never NaN, so that bits can be compared as
integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.rows import DTYPES, hostile_rows, weights
from tools.replay.script import SETS

DISTINCT = 67  # rows of a set; prime, so that no two sizes have the same rows in the same places of a slot
EPS = 1e-6

# What a call answers, by kind: plain sum; fused; fused with a residual of zeros (form B); and the first two on the
# outputs of a fused call.
KINDS = ("sum", "fused", "B", "chained sum", "chained fused")


@dataclass(frozen=True)
class Tables:
    """All as int32 words, [rows, words]; `weight` [hidden] in the rows' dtype. answers: by kind, a table an output."""

    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    answers: dict[str, tuple[torch.Tensor, ...]]

    @property
    def padding(self) -> int:
        """The first row of garbage."""
        return SETS * DISTINCT


def make_tables(
    rank: int, world_size: int, hidden: int, dtype: str, seed: int, device: torch.device, most_tokens: int
) -> Tables:
    kind = DTYPES[dtype]
    distinct = min(DISTINCT, most_tokens)
    weight = weights(hidden, kind, seed=seed)
    shares: list[list[torch.Tensor]] = [[] for _ in range(world_size + 1)]
    answers: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in KINDS}
    for turn in range(SETS):
        rows = [
            hostile_rows(distinct, hidden, kind, seed=SETS * seed + turn, rank=source)
            for source in range(world_size + 1)
        ]
        calm = [torch.randn(hidden, generator=torch.Generator().manual_seed(r)).to(kind) for r in range(world_size + 1)]
        found = _answers(rows, weight)
        nan = torch.stack([out.isnan().any(-1) for outs in found.values() for out in outs]).any(0)
        for share, row in zip(rows, calm, strict=True):
            share[nan] = row
        found = _answers(rows, weight)
        assert not any(out.isnan().any() for outs in found.values() for out in outs)
        for kept, row in zip(shares, rows, strict=True):
            kept.append(_spread(row))
        for name, outs in found.items():
            answers[name].append(tuple(_spread(out) for out in outs))
    garbage = hostile_rows(DISTINCT, hidden, kind, seed=seed, rank=100 + rank, share=0.5)

    def table(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([*parts, garbage]).view(torch.int32).to(device)

    return Tables(
        table(shares[rank]),
        table(shares[-1]),
        weight.to(device),
        {name: tuple(table(list(parts)) for parts in zip(*each, strict=True)) for name, each in answers.items()},
    )


def _spread(rows: torch.Tensor) -> torch.Tensor:
    """DISTINCT rows, by repeating `rows`."""
    return rows.repeat(-(-DISTINCT // len(rows)), 1)[:DISTINCT]


def _answers(rows: list[torch.Tensor], weight: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
    from mnnvl_ar import reference

    xs, residual = rows[:-1], rows[-1]
    norm, z = reference.all_reduce_rms_norm(xs, residual, weight, EPS)
    chained = [norm] * len(xs)
    return {
        "sum": (reference.all_reduce(xs),),
        "fused": (norm, z),
        "B": reference.all_reduce_rms_norm(xs, torch.zeros_like(residual), weight, EPS),
        "chained sum": (reference.all_reduce(chained),),
        "chained fused": reference.all_reduce_rms_norm(chained, z, weight, EPS),
    }


def plan(real: int, most_tokens: int, padding: int) -> torch.Tensor:
    """[turn, call, token] -> row of the tables, for `real` rows of tokens and padding behind them."""
    token = torch.arange(most_tokens)
    sets = (torch.arange(SETS).view(-1, 1) + torch.arange(SETS)) % SETS
    rows = sets.unsqueeze(-1) * DISTINCT + token % DISTINCT
    return torch.where(token < real, rows, padding + token % DISTINCT).int()
