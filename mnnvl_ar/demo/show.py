"""What the demo shows: a progress bar on stderr, then a table on stdout."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

from mnnvl_ar.demo.rank import Tally
from mnnvl_ar.demo.traffic import BUCKETS, MODELS

_WIDTH = 32


class Bar:
    """A line that is rewritten on a terminal, and printed now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = 0.0

    def show(self, share: float, calls: int) -> None:
        now = time.monotonic()
        if share < 1 and now - self._last < (0.1 if self._terminal else 10.0):
            return
        self._last = now
        full = round(min(share, 1.0) * _WIDTH)
        state = f"{calls} calls, all of their bits compared" if calls else "making inputs and right answers"
        text = f"[{'#' * full}{'.' * (_WIDTH - full)}] {min(share, 1.0):4.0%}  {state}"
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps is not rewritten
            print(f"\r{text[:width]:<{width}}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._terminal and self._last:
            print(file=sys.stderr)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def table(results: list[tuple[Any, ...]]) -> int:
    """Prints one line a size; `results` by rank: (tallies, transport, its reason). Returns how many outputs were
    wrong.
    """
    transport, reason = results[0][1:]
    line = "{:>6} {:>9}  {:<18} {:>9} {:>9} {:>9}  {:<10} {}"
    print(line.format("hidden", "tokens", "as in", "calls", "p50 us", "p99 us", "transport", "verdict"))
    total = wrong = 0
    for hidden in MODELS:
        for low, high in BUCKETS:
            tallies: list[Tally] = [found for r in results if (found := r[0].get((hidden, (low, high)))) is not None]
            times = [microseconds for tally in tallies for microseconds in tally.times]
            if not times:
                continue
            calls, bad = tallies[0].calls, sum(tally.wrong for tally in tallies)
            first = next((tally.first_wrong for tally in tallies if tally.wrong), "")
            verdict = f"{bad} WRONG, first: {first}" if bad else "bit exact"
            size = f"{low}-{high}" if low != high else f"{low}"
            p50, p99 = (f"{percentile(times, share):.1f}" for share in (0.5, 0.99))
            print(line.format(hidden, size, MODELS[hidden], calls, p50, p99, transport.strip("'"), verdict))
            total, wrong = total + calls, wrong + bad
    print(f"{reason}. Times are of all ranks, of fused and plain calls, and include the wait for the slowest rank.")
    print(f"{total} calls on each of {len(results)} ranks: {f'{wrong} outputs WRONG' if wrong else 'every bit right'}.")
    return wrong
