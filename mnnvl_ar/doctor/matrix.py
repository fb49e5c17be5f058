"""What is between each two GPUs or ranks, as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_MARGIN = 13  # where the report's values begin
_MEANS = {
    "NV": "NVn: n NVLinks",
    "PIX": "PIX: one PCIe switch",
    "PXB": "PXB: several PCIe switches",
    "PHB": "PHB: a PCIe host bridge",
    "NODE": "NODE: one NUMA node's host bridges",
    "SYS": "SYS: the link between sockets",
    "!": "!: no peer access",
    "~": "~: no P2P atomics",
    "?": "?: unknown",
}


def p2p(host: dict[str, Any]) -> list[str]:
    """Link, peer access and P2P atomics of each two GPUs of a host; nothing for one GPU. What is as it should be has no
    mark."""
    count = len(host["gpus"])
    if count < 2:
        return []

    def cell(a: int, b: int) -> str:
        link, reaches, atomics = (host[what][a][b] for what in ("links", "p2p", "p2p_atomics"))
        mark = "!" if reaches is False else "~" if atomics is False else ""
        return "?" if link is None and reaches is None else f"{link or ('-' if mark else 'P2P')}{mark}"

    table = _table("GPU", count, cell)
    shown = " ".join(table)
    means = [text for sign, text in _MEANS.items() if sign in shown.replace("P2P", "")]
    if "P2P" in shown:
        means.append("P2P: peer access, by what link is unknown")
    if "-!" in shown or "-~" in shown:
        means.append("-: link unknown")
    return [
        "  P2P        between each two GPUs; with peer access and P2P atomics where no mark says otherwise",
        *table,
        *_wrapped(means),
    ]


def pairs(found: list[dict[str, Any]], size: int) -> list[str]:
    """Of every two ranks by themselves: bandwidth above the diagonal, latency below."""
    by_ranks = {tuple(pair["ranks"]): pair for pair in found}
    good = next((pair for pair in found if not pair["error"]), None)

    def cell(a: int, b: int) -> str:
        pair = by_ranks.get((min(a, b), max(a, b)))
        if pair is None:
            return "?"
        return "FAILED" if pair["error"] else f"{pair['bandwidth_gb_s' if a < b else 'latency_us']:.1f}"

    if not found:
        return []
    lines = ["  Every two ranks by themselves:", *_table("rank", size, cell)]
    if good is not None:
        large, small = f"{good['large_bytes'] >> 20} MiB", f"{good['small_bytes']} bytes"
        if good["large_bytes"] < 1 << 20:
            large = f"{good['large_bytes'] >> 10} KiB"
        how = "replays of CUDA graphs of them alone" if any(good["gpus"]) else "calls alone"
        lines += [
            f"{'':{_MARGIN}}above the diagonal GB/s, what each rank sends in an all_reduce of {large} over its time;",
            f"{'':{_MARGIN}}below it us, what one of {small} takes (medians of {how})",
        ]
    return lines


def _table(name: str, count: int, cell: Callable[[int, int], str]) -> list[str]:
    cells = [["-" if a == b else cell(a, b) for b in range(count)] for a in range(count)]
    width = max(len(text) for row in cells for text in row) + 2
    head = "".join(f"{b:>{width}}" for b in range(count))
    rows = ["".join(f"{text:>{width}}" for text in row) for row in cells]
    margin = _MARGIN - 2
    return [f"{name:>{margin}}{head}", *(f"{a:>{margin}}{row}" for a, row in enumerate(rows))]


def _wrapped(means: Sequence[str]) -> list[str]:
    lines = [""]
    for text in means:
        longer = f"{lines[-1]}; {text}" if lines[-1] else text
        lines = [*lines[:-1], longer] if len(longer) <= 100 else [*lines, text]
    return [f"{'':{_MARGIN}}{line}" for line in lines if line]
