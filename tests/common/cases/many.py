"""Calls of many ranks: what each of a world takes, by one CTA a rank."""

from __future__ import annotations

from common.cases.calls import Call
from common.many_ranks import fits_one_cta

WORLDS = (12, 16, 17, 24, 72)  # of 17, the last rank awaits nobody beside itself behind the first sixteen
TOKENS = 8  # at most
# One vector; an odd number of vectors, fewer than 72 owners; an odd number of them; whole groups; all that a CTA holds.
HIDDENS = {"bf16": (8, 264, 2888, 3584), "fp32": (4, 132, 1444, 1792)}
ORDERED = 2  # of hostile_rows: kind 2


def calls_of_many(dtype: str) -> list[Call]:
    """Both ops by both strategies, of one row, of a few, and of rows that queue up; aliased and not; other sizes and
    strategies from each call to the next. The first row is one whose sum depends on the order of addition."""
    return [
        Call(op, tokens, hidden, dtype, out=out, strategy=strategy, pdl=0, seed=8 * hidden + ORDERED)
        for hidden in HIDDENS[dtype]
        for tokens in (1, 3, TOKENS)
        for op, out in (("all_reduce_rms_norm", "E"), ("all_reduce", "E"), ("all_reduce_rms_norm", "A"))
        for strategy in (0, 1)
        if fits_one_cta(hidden, dtype)
    ]
