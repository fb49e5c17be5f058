"""What a rack has measured, beside what gb200/predictions.md expects of it: `python bench/report.py --predicted FILE`.

Predicted are fused calls in bf16, hidden 7168, in graphs, warm, in a chain, over multicast; so those rows are compared,
of our forced strategies. A cell that was not measured is told as such, and refutes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bench import expected, results
from bench.results import Row

STRATEGIES = {"one_shot": "one-shot", "two_shot": "two-shot"}


class Measured(expected.Case):
    """What was measured, asked as the model is asked. NaN where there is no such row."""

    def __init__(self, rows: Iterable[Row], transport: str) -> None:
        self.us = {
            (row["strategy"], row["tp"], row["tokens"]): float(row["p50_us"])
            for row in rows
            if is_predicted(row) and row["transport"] == transport
        }

    def one_shot_us(self, tokens: int, ranks: int, hidden: int = expected.HIDDEN) -> float:
        return self.us.get(("one_shot", ranks, tokens), math.nan)

    def two_shot_us(self, tokens: int, ranks: int, hidden: int = expected.HIDDEN) -> float:
        return self.us.get(("two_shot", ranks, tokens), math.nan)

    def crossover_bytes(self, ranks: int, hidden: int = expected.HIDDEN) -> float:  # type: ignore[override]
        """Where the lines between the sizes that were measured by both strategies cross; 0 if two-shot is the quicker
        one at the smallest already. If it never is: the largest size, or NaN where that says nothing, as the crossover
        is expected there or beyond."""
        row, before = hidden * 2, None
        for tokens in sorted({tokens for _, tp, tokens in self.us if tp == ranks}):
            late = self.one_shot_us(tokens, ranks) - self.two_shot_us(tokens, ranks)
            if math.isnan(late):
                continue
            if late > 0 and before is None:
                return 0.0
            if late > 0 and before is not None:
                start, early = before
                return float(start + (tokens - start) * -early / (late - early)) * row
            before = tokens, late
        most = max(case.crossover_bytes(ranks, hidden) for case in expected.EVERY)
        return math.nan if before is None or before[0] * row <= most else float(before[0] * row)


def is_predicted(row: Row) -> bool:
    """Of a right answer of a forced strategy, in the form that is predicted."""
    form = {"op": "fused", "dtype": "bfloat16", "hidden": expected.HIDDEN}
    own = results.is_ours(row["variant"]) and row.get("strategy") in STRATEGIES and row.get("pdl") == "auto"
    return bool(own and row["ok"] and results.is_usual(row) and all(row[name] == value for name, value in form.items()))


def lines(found: dict[str, Any]) -> list[str]:
    """Of a record of bench.gb200."""
    rows = found["rows"]
    measured, unicast = Measured(rows, "multicast"), Measured(rows, "unicast")
    return [
        *_about(found),
        "",
        *_cells(rows, measured, unicast),
        "",
        *_refuted(measured),
        *_slower(measured, unicast),
        *_wrong(rows),
    ]


def is_sound(found: dict[str, Any]) -> bool:
    """The run came to its end, and every result of ours was right. A prediction that is refuted is a finding."""
    return found["status"] == 0 and not _wrong_rows(found["rows"])


def _about(found: dict[str, Any]) -> list[str]:
    told = [f"{found['machine'] or 'no machine measured'}, {len(found['nodes'])} nodes, {found['began']} UTC"]
    told += [f"  INCOMPLETE: {found['trouble']}"] if found["trouble"] else []
    for part in found["parts"]:
        why = f": {part['why']}" if part["why"] else ""
        told.append(f"  {part['name']:<10} {part['status']}{why}")
    return told


def _cells(rows: Sequence[Row], measured: Measured, unicast: Measured) -> list[str]:
    told = [
        "us a call: fused, bf16, hidden 7168, in a chain, over multicast. Predicted: likely (all quick to all slow).",
        f"{'TP':>3} {'T':>5} {'strategy':<9} {'predicted':>22} {'measured':>9}  {'verdict':<15}{'unicast':>8}  peer",
    ]
    sizes = sorted({(tp, tokens) for _, tp, tokens in [*measured.us, *unicast.us]})
    wanted = {(tp, tokens) for tp in expected.TPS for tokens in expected.TOKENS}
    for tp, tokens in sorted(wanted | {size for size in sizes if size[0] in expected.TPS}):
        for strategy, name in STRATEGIES.items():
            low, likely, high = (
                float(getattr(case, f"{strategy}_us")(tokens, tp))
                for case in (expected.LOW, expected.LIKELY, expected.HIGH)
            )
            us = measured.us.get((strategy, tp, tokens), math.nan)
            other = unicast.us.get((strategy, tp, tokens), math.nan)
            told.append(
                f"{tp:>3} {tokens:>5} {name:<9} {f'{likely:.1f} ({low:.1f} to {high:.1f})':>22} {_us(us):>9}  "
                f"{_verdict(us, low, high):<15}{_us(other):>8}  {_peer(rows, tp, tokens)}".rstrip()
            )
    return told


def _peer(rows: Sequence[Row], tp: int, tokens: int) -> str:
    """The quickest right one in that cell, measured in the same run."""
    size = {"op": "fused", "dtype": "bfloat16", "hidden": expected.HIDDEN, "tp": tp, "tokens": tokens}
    cell = [row for row in rows if results.is_usual(row) and all(row[name] == value for name, value in size.items())]
    _, best = results.ours_and_best(cell)
    return "-" if best is None else f"{best['variant']} {best['p50_us']:.1f}"


def _refuted(measured: Measured) -> list[str]:
    told = ["Predictions that can be refuted (expected, from, to):"]
    got = expected.falsifiers(measured, (measured,))
    for (what, likely, least, most, wrong), (_, value, *_) in zip(expected.falsifiers(), got, strict=True):
        verdict = _verdict(value, least, most)
        blame = f"; then wrong is: {wrong}" if verdict.isupper() else ""
        told.append(f"  {verdict:<15}{what}: {_figure(value)} ({likely:.3g}, {least:.3g} to {most:.3g}){blame}")
    return told


def _slower(measured: Measured, unicast: Measured) -> list[str]:
    """Cells in which multicast takes longer than unicast by more than the difference of the hops."""
    most = max(case.figure["multicast hop"] - case.figure["unicast hop"] for case in expected.EVERY)
    both = sorted(measured.us.keys() & unicast.us.keys(), key=lambda key: key[1:])
    hops = {key: 2 if key[0] == "two_shot" and key[2] >= expected.QUEUED_FROM else 1 for key in both}
    slow = [key for key in both if measured.us[key] - unicast.us[key] > hops[key] * most]
    what = f"multicast slower than unicast by more than {most:.2g} us a hop"
    if not both:
        return [f"  {'not measured':<15}{what}"]
    named = [f"{STRATEGIES[key[0]]} TP{key[1]} T={key[2]}" for key in slow]
    return [f"  {'REFUTED' if slow else 'inside':<15}{what}: {', '.join(named) or f'in none of {len(both)} cells'}"]


def _wrong_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if results.is_ours(row["variant"]) and not row["ok"]]


def _wrong(rows: Sequence[Row]) -> list[str]:
    ours = [row for row in rows if results.is_ours(row["variant"])]
    wrong = _wrong_rows(rows)
    if not ours:
        return [f"  {'not measured':<15}any wrong bit"]
    told = [f"  {'REFUTED' if wrong else 'inside':<15}any wrong bit: in {len(wrong)} of {len(ours)} rows of ours"]
    for row in wrong[:10]:
        told.append(f"    {row['variant']} {row['op']} TP{row['tp']} T={row['tokens']} {row['dtype']}: {row['error']}")
    return told


def _verdict(value: float, least: float, most: float) -> str:
    if math.isnan(value):
        return "not measured"
    return "inside" if least <= value <= most else "OUTSIDE, BELOW" if value < least else "OUTSIDE, ABOVE"


def _us(us: float) -> str:
    return "-" if math.isnan(us) else f"{us:.2f}"


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
