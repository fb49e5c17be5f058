"""What calls are expected to take on GB200 over multicast: an estimate with a range, for whoever measures to refute.

    one-shot = gap + send + hop(m) + tail + waits + (R - 1) x / link + boundaries
    two-shot = gap + send + hop(u) + hop(m) + tail + waits + 2 (R - 1) / R x / link + queue + boundaries
    waits    = chunks * trip + R * sum

x: bytes of a rank's message. hop(u), hop(m): by unicast, by multicast. chunks: R / 16, rounded up: sources awaited
together (csrc/kernels/receive.cuh). Where rows queue up (T >= 64), the link is that of paced rows, and two-shot's hops
take twice as long (queue). boundaries: one less than the pieces of a call in a workspace of 64 MiB
(csrc/protocol/pieces.h).

bench/model.py holds the floor beneath it, and makes the page of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

TPS = (4, 8, 16, 36, 72)
TOKENS = (1, 4, 16, 64, 256, 1024)
HIDDEN = 7168
QUEUED_FROM = 64  # tokens
SLOT_BYTES = ((64 << 20) - 16384) // 3
CHUNK, CHUNK_BEFORE = 16, 4


@dataclass(frozen=True)
class Input:
    """`low` is what makes calls quick, `high` what makes them slow."""

    low: float
    likely: float
    high: float
    unit: str
    source: str


INPUTS = {
    "gap": Input(0.45, 0.55, 0.7, "us", "from a call's end to the next one's first store: as in graphs on H200"),
    "send": Input(0.3, 0.35, 0.5, "us", "from there to the last store of a small call: as on H200"),
    "unicast hop": Input(0.6, 0.85, 1.1, "us", "0.61 on H200's NVSwitch, and a rack's longer wires: a guess"),
    "multicast hop": Input(0.85, 1.15, 1.6, "us", "that, and 0.3 for the switch to multiply: a guess"),
    "tail": Input(0.55, 0.65, 0.8, "us", "from the last row's arrival to the kernel's end: as on H200"),
    "trip": Input(0.14, 0.2, 0.3, "us", "one to L2, for sixteen sources at a time: 275 to 580 clocks on H200"),
    "sum": Input(0.006, 0.01, 0.02, "us", "of one source: some 20 instructions, by the machine code"),
    "link": Input(
        760e3, 690e3, 600e3, "bytes a us", "what kernels get of 900 GB/s, as they get 362 to 386 of H200's 450"
    ),
    "paced link": Input(720e3, 663e3, 580e3, "bytes a us", "340 bytes a clock at 1.95 GHz; H200: 183 at 1.98"),
    "boundary": Input(2.0, 3.0, 4.0, "us", "between two pieces: 2.9 to 3.6 on H200 (docs/memory.md)"),
}


class Case:
    """One choice of the inputs, "low", "likely" or "high": of times, and of rates."""

    def __init__(self, times: str, rates: str) -> None:
        self.figure = {
            name: float(getattr(each, times if each.unit == "us" else rates)) for name, each in INPUTS.items()
        }

    def one_shot_us(self, tokens: int, ranks: int, hidden: int = HIDDEN) -> float:
        wire = (ranks - 1) * tokens * hidden * 2 / self._link(tokens)
        pieces = _pieces(tokens, ranks * hidden * 2)
        return self._small(ranks) + wire + (pieces - 1) * self.figure["boundary"]

    def two_shot_us(self, tokens: int, ranks: int, hidden: int = HIDDEN) -> float:
        wire = 2 * (ranks - 1) / ranks * tokens * hidden * 2 / self._link(tokens)
        hops = self.figure["unicast hop"] + self.figure["multicast hop"]
        queue = hops if tokens >= QUEUED_FROM else 0.0
        vectors = hidden // 8
        pieces = _pieces(tokens, (ranks * -(-vectors // ranks) + vectors) * 16)
        more = self.figure["unicast hop"] + queue + (pieces - 1) * self.figure["boundary"]
        return self._small(ranks) + more + wire

    def crossover_bytes(self, ranks: int, hidden: int = HIDDEN) -> int:
        """The largest message of whole tokens for which one-shot is the quicker one."""
        tokens = 0
        while self.one_shot_us(tokens + 1, ranks, hidden) <= self.two_shot_us(tokens + 1, ranks, hidden):
            tokens += 1
        return tokens * hidden * 2

    def _small(self, ranks: int) -> float:
        fixed = ("gap", "send", "multicast hop", "tail")
        waits = -(-ranks // CHUNK) * self.figure["trip"] + ranks * self.figure["sum"]
        return sum(self.figure[name] for name in fixed) + waits

    def _link(self, tokens: int) -> float:
        return self.figure["paced link" if tokens >= QUEUED_FROM else "link"]


LOW, LIKELY, HIGH = (Case(which, which) for which in ("low", "likely", "high"))
EVERY = (LOW, LIKELY, HIGH, Case("low", "high"), Case("high", "low"))


def _pieces(tokens: int, slot_bytes_a_row: int) -> int:
    return -(-tokens // (SLOT_BYTES // slot_bytes_a_row))


def _times(name: str) -> list[str]:
    lines = ["| tokens | " + " | ".join(f"TP{tp}" for tp in TPS) + " |", "|---" * (len(TPS) + 1) + "|"]
    for tokens in TOKENS:
        cells = []
        for tp in TPS:
            low, likely, high = (getattr(case, name)(tokens, tp) for case in (LOW, LIKELY, HIGH))
            cells.append(f"{_short(likely)} ({_short(low)}-{_short(high)})")
        lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
    return lines


def _short(us: float) -> str:
    return f"{us:.1f}" if us < 20 else f"{us:.0f}"


def falsifiers(likely: Case = LIKELY, every: Sequence[Case] = EVERY) -> list[tuple[str, float, float, float, str]]:
    """What to measure, the figure expected (likely, least, most), and what is wrong if it is not that. Of other cases,
    such as what was measured, their figures."""

    def figure(of: Callable[[Case], float]) -> tuple[float, float, float]:
        found = [of(case) for case in every]
        return of(likely), min(found), max(found)

    return [
        (
            "one-shot at T=1, TP8, us",
            *figure(lambda c: c.one_shot_us(1, 8)),
            "gap, send, tail or the multicast's hop",
        ),
        (
            "two-shot less one-shot at T=1, TP8, us",
            *figure(lambda c: c.two_shot_us(1, 8) - c.one_shot_us(1, 8)),
            "the unicast's hop; below 0, that a stage waits for its hop at all",
        ),
        (
            "one-shot at T=1, TP72 less TP36, us",
            *figure(lambda c: c.one_shot_us(1, 72) - c.one_shot_us(1, 36)),
            "that chunks of sources are awaited one after another; 0.7 is the bytes alone",
        ),
        (
            "one-shot, T=128 less T=64, TP8: GB/s that arrive",
            *figure(lambda c: 64 * HIDDEN * 2 * 7 / (c.one_shot_us(128, 8) - c.one_shot_us(64, 8)) / 1e3),
            "the paced link",
        ),
        (
            "two-shot, T=512 less T=256, TP72: GB/s that arrive",
            *figure(lambda c: 256 * HIDDEN * 2 * 142 / 72 / (c.two_shot_us(512, 72) - c.two_shot_us(256, 72)) / 1e3),
            "the link by multicast: a switch that multiplies more slowly than it forwards",
        ),
        (
            "message where two-shot takes over, TP8, KB",
            *figure(lambda c: c.crossover_bytes(8) / 1e3),
            "the model's difference of the two, and with it the built-in choice for GB200",
        ),
        (
            "two-shot less one-shot at T=1, TP72, us",
            *figure(lambda c: c.two_shot_us(1, 72) - c.one_shot_us(1, 72)),
            "that two-shot is taken at every size there",
        ),
    ]


def section() -> list[str]:
    """Of the page: lines of Markdown."""
    lines = [
        "## What is expected",
        "",
        "```",
        "one-shot = gap + send + hop(m) + tail + waits + (R - 1) x / link + boundaries",
        "two-shot = gap + send + hop(u) + hop(m) + tail + waits + 2 (R - 1) / R x / link + queue + boundaries",
        "waits    = chunks * trip + R * sum",
        "```",
        "x: bytes of a rank's message; hop(u), hop(m): by unicast, by multicast; chunks: R / 16, rounded up, sources",
        f"awaited together; queue: both hops once more, and the paced link, from T = {QUEUED_FROM} on, where rows",
        "queue up; boundaries: between the pieces of a call in 64 MiB. The code is `bench/expected.py`.",
        "",
        "| input | likely | quick | slow | unit | where from |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in INPUTS.items():
        lines.append(
            f"| {name} | {each.likely:g} | {each.low:g} | {each.high:g} | {each.unit} | {each.source} |".replace(
                "e+05", "e5"
            )
        )
    lines += ["", f"Fused, bf16, hidden {HIDDEN}, us a call; in brackets with all inputs quick, and with all slow."]
    for title, name in (("One-shot", "one_shot_us"), ("Two-shot", "two_shot_us")):
        lines += ["", f"### {title}", "", *_times(name)]
    lines += [
        "",
        "## What would refute it",
        "",
        "| measured | expected | from | to | outside of that, wrong is |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {what} | {a:.3g} | {b:.3g} | {c:.3g} | {why} |" for what, a, b, c, why in falsifiers()]
    lines += [
        "",
        "And, without a figure: a cell in which multicast is slower than unicast by more than the difference of the",
        "hops; a time that differs between the nodes of a rack by more than a hop; any wrong bit.",
        "",
        "Until 2026-11-30 sources were awaited by fours where the world size is not 2, 4 or 8. By sixteens it is less",
        "by " + ", ".join(f"{_saved(tp):.2f} at TP{tp}" for tp in (16, 36, 72)) + ", in us, by the trips alone.",
    ]
    return lines


def _saved(ranks: int) -> float:
    return (-(-ranks // CHUNK_BEFORE) - -(-ranks // CHUNK)) * INPUTS["trip"].likely
