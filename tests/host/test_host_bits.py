"""Both ops over the host transport give the reference's bits, whatever the world size, shape, dtype, strategy and
aliasing.
"""

import itertools

import pytest

from common.cases.calls import ALIASING, Call, check_calls
from common.cases.mixed import mixed_calls
from common.ranks import rank_pool

WORKSPACE = {"max_tokens": 64, "hidden": 8192}  # of fp32: holds any call here


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
