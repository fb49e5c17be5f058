"""Calls with every property drawn at random."""

from __future__ import annotations

import random
from typing import Any

from common.cases.calls import ALIASING, Call, Prepared, check_calls

TOKENS = (1, 2, 3, 4, 5, 7, 8, 16, 24, 33, 64)
HIDDENS = {"bf16": (8, 16, 24, 264, 2048, 2880, 4096, 8192), "fp32": (4, 8, 12, 132, 2048, 2880, 4096, 8192)}


def mixed_calls(count: int, seed: int, most_elements: int, pdls: tuple[int, ...] = (-1,)) -> list[Call]:
    """Calls with every property drawn at random, so that neighbouring calls differ in size, dtype and strategy."""
    draw = random.Random(seed)
    calls = []
    for number in range(count):
        dtype = draw.choice(("bf16", "fp16", "fp32"))
        hidden = draw.choice(HIDDENS["fp32" if dtype == "fp32" else "bf16"])
        tokens = draw.choice([t for t in TOKENS if t == 1 or t * hidden <= most_elements])
        op = draw.choice(("all_reduce", "all_reduce_rms_norm", "all_reduce_rms_norm"))
        out = draw.choice(("", "A", "E") if op == "all_reduce" else ("", *ALIASING))
        lead = (draw.choice([d for d in (1, 2, 4) if tokens % d == 0]), 1) if draw.random() < 0.2 else ()
        calls.append(
            Call(
                op=op,
                tokens=tokens,
                hidden=hidden,
                dtype=dtype,
                out=out,
                strategy=draw.choice((-1, 0, 1)),
                pdl=draw.choice(pdls),
                fp32_weight=draw.random() < 0.5,
                weight_bias=draw.choice((0.0, 1.0)),
                eps=draw.choice((1e-5, 1e-6)),
                lead=(lead[0], tokens // lead[0]) if lead else (),
                seed=number,
            )
        )
    return calls


def check_empty_calls(rank: Any, workspace: dict[str, Any]) -> None:
    """Calls without tokens do nothing: ranks may even disagree on how many they make."""
    handle = rank.workspace(**workspace).handle
    for out in ("", "E", "A"):
        empty = [Call(op, 0, 64, out=out) for op in ("all_reduce", "all_reduce_rms_norm")]
        check_calls(rank, empty, handle=handle)
        for _ in range(rank.rank):
            Prepared(rank, empty[1]).launch(handle)
        check_calls(rank, [Call(tokens=2)], handle=handle)
