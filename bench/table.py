"""The table that a run prints: one line a cell, ours beside the best peer."""

from __future__ import annotations

from collections.abc import Iterable

from bench.results import Row, is_ours, ours_and_best

LEGEND = (
    "us a call. A round is the mean of a replay's calls; p50 and p99 are over rounds, of the slowest rank; p99 of fewer"
    " than 100 rounds is the slowest round"
)
HEADER = (
    f"{'cell':<38}{'ours us':>9}{'p99':>8}{'best peer us':>14} {'':<24}{'speed-up':>9}{'floor':>8}{'x floor':>9}  ok"
)


def line(name: str, rows: Iterable[Row]) -> str:
    rows = list(rows)
    ours, best = ours_and_best(rows)
    ours = ours or next((row for row in rows if is_ours(row["variant"])), None)
    text = f"{name:<38}"
    text += f"{ours['p50_us']:>9.2f}{ours['p99_us']:>8.2f}" if ours else f"{'-':>9}{'-':>8}"
    text += f"{best['p50_us']:>14.2f} {best['variant']:<24}" if best else f"{'-':>14} {'':<24}"
    text += f"{best['p50_us'] / ours['p50_us']:>8.2f}x" if ours and best else f"{'-':>9}"
    if ours and ours["floor_us"] is not None:
        text += f"{ours['floor_us']:>8.2f}{ours['p50_us'] / ours['floor_us']:>8.2f}x"
    else:
        text += f"{'-':>8}{'-':>9}"
    wrong = [row["variant"] for row in rows if not row["ok"]]
    return text + "  " + ("yes" if not wrong else "NO: " + ", ".join(wrong))


def details(rows: Iterable[Row]) -> str:
    """Every variant of a cell, quickest first, each with the interval around its p50; and what was taken off."""
    ordered = sorted(rows, key=lambda row: float(row["p50_us"]))
    each = [f"{row['variant']} {row['p50_us']:.2f} [{row['low_us']:.2f} {row['high_us']:.2f}]" for row in ordered]
    base = ordered[0]["base_us"] if ordered else 0
    return "    " + "  ".join([*each, *([f"(taken off {base:.2f})"] if base else [])])
