"""Both ops over the host transport give the reference's bits, whatever the world size, shape, dtype, strategy and
aliasing.
"""

import itertools
import random

import pytest

from common.cases.calls import ALIASING, Call, check_calls
from common.ranks import rank_pool

WORKSPACE = {"max_tokens": 64, "hidden": 8192}  # of fp32: holds any call here
TOKENS = (1, 2, 3, 4, 5, 7, 8, 16, 24, 33, 64)
HIDDENS = {"bf16": (8, 16, 24, 264, 2048, 2880, 4096, 8192), "fp32": (4, 8, 12, 132, 2048, 2880, 4096, 8192)}


def mixed_calls(count: int, seed: int, most_elements: int) -> list[Call]:
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
                fp32_weight=draw.random() < 0.5,
                weight_bias=draw.choice((0.0, 1.0)),
                eps=draw.choice((1e-5, 1e-6)),
                lead=(lead[0], tokens // lead[0]) if lead else (),
                seed=number,
            )
        )
    return calls


@pytest.mark.parametrize(
    ("ranks", "count", "most_elements"),
    [(1, 60, 1 << 17), (2, 100, 1 << 17), (3, 60, 1 << 16), (4, 100, 1 << 16), (8, 40, 1 << 15), (16, 12, 1 << 14)],
)
def test_mixed_calls(ranks: int, count: int, most_elements: int) -> None:
    rank_pool(ranks).run(check_calls, mixed_calls(count, ranks, most_elements), WORKSPACE, timeout=120)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("op", ["all_reduce", "all_reduce_rms_norm"])
def test_every_form(op: str, dtype: str) -> None:
    forms = ("", "A", "E") if op == "all_reduce" else ("", *ALIASING)
    choices = itertools.product(forms, (-1, 0, 1), (0.0, 1.0), (False, True))
    calls = [
        Call(op, 6, 264, dtype, out, strategy, weight_bias=bias, fp32_weight=fp32, seed=number)
        for number, (out, strategy, bias, fp32) in enumerate(choices)
    ]
    rank_pool(4).run(check_calls, calls, WORKSPACE)


@pytest.mark.parametrize("hidden", [8, 24, 256, 264, 1544, 2880, 7168, 8192, 16384])
def test_rows_of_any_length(hidden: int) -> None:
    calls = [Call(op, 3, hidden, "bf16", strategy=s) for op in ("all_reduce", "all_reduce_rms_norm") for s in (0, 1)]
    rank_pool(3).run(check_calls, calls, WORKSPACE)


@pytest.mark.parametrize("lead", [(2, 3), (1, 6), (6, 1), (2, 3, 1)])
def test_more_dimensions(lead: tuple[int, ...]) -> None:
    calls = [Call(op, 6, 64, out=out, lead=lead) for op in ("all_reduce", "all_reduce_rms_norm") for out in ("", "E")]
    rank_pool(2).run(check_calls, calls, WORKSPACE)


def test_no_tokens_is_no_call() -> None:
    """Nothing advances: ranks may even disagree on how many such calls they make."""
    rank_pool(4).run(uneven_empty_calls)


def uneven_empty_calls(rank) -> None:
    for out in ("", "E", "A"):
        empty = [Call(op, 0, 64, out=out) for op in ("all_reduce", "all_reduce_rms_norm")]
        handle = rank.workspace(**WORKSPACE).handle
        check_calls(rank, empty, handle=handle)
        from common.cases.calls import Prepared

        for _ in range(rank.rank):
            Prepared(rank, empty[1]).launch(handle)
        check_calls(rank, [Call(tokens=2)], handle=handle)
