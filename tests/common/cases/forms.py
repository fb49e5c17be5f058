"""Calls by which every form of launch runs (csrc/launch/form.h), and a check that every compiled kernel did.

Functions that begin with check_ are run by all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from common.cases import outputs
from common.cases.calls import ALIASING, Call, Prepared
from common.cases.graph_nodes import captured, kernels_of
from common.cases.quantised import KINDS, Quantised
from common.ranks import ROOT

# Epilogues whose outputs are not like x, and that are no quantised ones. Only test builds have them.
OTHERS = [each for each in vars(outputs).values() if isinstance(each, type) and hasattr(each, "is_poisoned")]
# Forms follow from these alone, as with a crossover no table is asked. Rows of one warp, by four CTAs: four have a
# cluster each, or go one at a time (two-shot); eight queue up, or go two at a time; nine, four at a time.
SMALL = {"max_ctas": 4, "crossover": 1 << 30}
TOKENS = (4, 8, 9)
# Rows of 20 warps, so of 7 CTAs or, by two columns a thread, of 5: of 20 CTAs only these hold four rows at once, and
# where five queue up, they are more clusters.
WIDE = {"max_ctas": 20, "cluster": 8, "crossover": 1 << 30}
WIDE_TOKENS, WIDE_BYTES = (4, 5), 10240
MADE_FOR = {"max_tokens": 9, "hidden": 2560, "strategy": "one_shot", "deadline": 5.0}  # in fp32


def every_form(pdl: int) -> list[Call]:
    calls = [Call("all_reduce", 5, 264, out=out, strategy=s, pdl=pdl) for out in ("", "A", "E") for s in (0, 1)]
    return calls + [Call(tokens=5, hidden=264, out=out, strategy=s, pdl=pdl) for out in ("", *ALIASING) for s in (0, 1)]


def calls_of_grids() -> list[Call]:
    """A long row, and rows that queue up where there are few CTAs."""
    return [
        Call(tokens=t, hidden=h, strategy=s, out=out, seed=t)
        for t, h in ((1, 8192), (17, 2880))
        for s in (0, 1)
        for out in ("", "A", "C")
    ]


def calls_of_two_columns() -> list[Call]:
    """Of two ranks, by eight CTAs: whole groups of 32 vectors, an odd number, one that is not full; rows that queue."""
    rows = [(4, 8192), (4, 7424), (4, 7176), (4, 7936), (4, 7944), (8, 7168), (7, 6920), (5, 8192)]
    rows += [(9, 7168), (25, 7176), (13, 8192), (9, 7936), (6, 7944)]
    calls = [
        Call(op, tokens, hidden // (2 if dtype == "fp32" else 1), dtype, strategy=0, out=out, seed=tokens)
        for op in ("all_reduce", "all_reduce_rms_norm")
        for tokens, hidden in rows
        for dtype, out in (("bf16", ""), ("bf16", "A"), ("fp16", ""), ("fp32", ""))
    ]
    return calls + [
        replace(call, fp32_weight=True) for call in calls if call.op != "all_reduce" and call.dtype == "bf16"
    ]


def others_here() -> list[Any]:
    return OTHERS if hasattr(torch.ops.mnnvl_ar, "_sabotage") else []


def kernels_built(world_size: int) -> int:
    """For so many ranks: a form, an epilogue and a dtype each."""
    forms = {1: 7, 2: 7, 8: 4}.get(world_size, 5)
    if torch.cuda.get_device_capability()[0] >= 10 and world_size != 8:
        forms -= 1  # four rows at a time
    with_fp32 = 2 + len(others_here())
    epilogues = len([*(ROOT / "csrc" / "epilogues").glob("*.cu")]) - len(OTHERS) + len(others_here())
    return forms * (3 * with_fp32 + 2 * (epilogues - with_fp32))


def _prepared(rank: Any, tokens: tuple[int, ...], strategies: tuple[int, ...], row_bytes: int) -> Iterator[list[Any]]:
    """Calls of every epilogue and dtype, an epilogue at a time. row_bytes: of a row, at least."""

    def calls(op: str, dtypes: tuple[str, ...]) -> list[Call]:
        return [
            Call(op, t, row_bytes // (4 if dtype == "fp32" else 2), dtype, out="E", strategy=s, seed=t)
            for t in tokens
            for s in strategies
            for dtype in dtypes
        ]

    for op in ("all_reduce", "all_reduce_rms_norm"):
        yield [Prepared(rank, call) for call in calls(op, ("bf16", "fp16", "fp32"))]
    for other in others_here():
        yield [other(rank, call) for call in calls("all_reduce_rms_norm", ("bf16", "fp16", "fp32"))]
    for kind in KINDS:
        yield [Quantised(rank, kind, call) for call in calls("all_reduce_rms_norm", ("bf16", "fp16"))]


def check_every_kernel(rank: Any, tokens: tuple[int, ...] = TOKENS) -> None:
    """Every kernel that is compiled for so many ranks runs, and gives the right bits. By their names, which a graph
    tells: each call is captured, and replayed twice."""
    sets = [(SMALL, tokens, (0, 1), 128)]
    if rank.world_size <= 2:  # others have no two columns a thread
        sets.append((WIDE, WIDE_TOKENS, (0,), WIDE_BYTES))
    names: set[str] = set()
    graphs = []  # to the end: where one goes, the device may be waited for, and with it a peer's call that waits for us
    for options, *which in sets:
        workspace = rank.workspace(**MADE_FOR, **options)
        for prepared in _prepared(rank, *which):
            graphs.append(
                captured(
                    rank,
                    lambda made=prepared, handle=workspace.handle: [each.launch(handle) for each in made],
                    lambda graph: names.update(kernel.name for kernel in kernels_of(graph)),
                )
            )
            for _ in range(2):
                graphs[-1].replay()
            rank.synchronize()
            workspace.check()
            wrong = [line for each in prepared for line in each.wrong()]
            assert not wrong, "\n".join(wrong[:8])
            rank.barrier()
    assert len(names) == kernels_built(rank.world_size), f"{len(names)} kernels ran: {sorted(names)}"
