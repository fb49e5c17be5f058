"""The figures to reach on H200 (bf16, fused, in a graph, same run), and how a result stands against them.

Those of quantised ops are of cells in a chain and between GEMMs alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bench.quantised import KINDS
from bench.results import OURS, Row, by_cell, cell_key, is_ours, is_usual, ours_and_best

SMALL_TOKENS = 128
SMALL_GEOMEAN, SMALL_EACH, LARGE_EACH = 2.0, 1.3, 1.1
TP8_H7168_US = {1: 3.2, 8: 4.6, 64: 8.0, 128: 12.0, 1024: 75.0}
FLOOR_TOKENS = 8
FLOOR_SMALL, FLOOR_LARGE = 1.4, 1.6
CPU_US = 6.0
WORKSPACE_MIB = 64
# Of quantised ops: what a norm's codes cost besides the norm, and speed-ups over two kernels and over fused ones.
CODES_TOKENS, CODES_US = 8, 0.15
VLLM, OVER_VLLM = "mnnvl_ar+vllm", 1.5
FLASHINFER, FUSED_TOKENS, OVER_FUSED = "flashinfer/", 64, 1.3
WITH_NORM = "/with_norm"


@dataclass(frozen=True)
class Figure:
    """name, what was got and wanted in words; reached: None where there is nothing to judge by."""

    name: str
    got: str
    wanted: str
    reached: bool | None

    def __str__(self) -> str:
        verdict = {True: "reached", False: "NOT REACHED", None: "not measured"}[self.reached]
        return f"{verdict:<13}{self.name}: {self.got} (wanted {self.wanted})"


def judge(rows: Iterable[Row]) -> list[Figure]:
    """Every figure that latencies decide, over all rows given: bf16, fused, graph, warm."""
    rows = [row for row in rows if _counts(row)]
    pairs = [(ours, best) for ours, best in map(ours_and_best, by_cell(rows).values()) if ours is not None]
    small = [(_ratio(o, b), o, b) for o, b in pairs if b is not None and o["tokens"] <= SMALL_TOKENS]
    large = [(_ratio(o, b), o, b) for o, b in pairs if b is not None and o["tokens"] > SMALL_TOKENS]
    figures = [_geomean([ratio for ratio, _, _ in small])]
    figures.append(_each(f"each cell's speed-up, T <= {SMALL_TOKENS}", small, SMALL_EACH))
    figures.append(_each(f"each cell's speed-up, T > {SMALL_TOKENS}", large, LARGE_EACH))
    for tokens, wanted in TP8_H7168_US.items():
        found = [o for o, _ in pairs if (o["tp"], o["hidden"], o["tokens"]) == (8, 7168, tokens)]
        figures.append(_at_most(f"TP8 H=7168 T={tokens}", found, wanted))
    for name, limit, cells in (
        (f"time over floor, T <= {FLOOR_TOKENS}", FLOOR_SMALL, [o for o, _ in pairs if o["tokens"] <= FLOOR_TOKENS]),
        (f"time over floor, T > {FLOOR_TOKENS}", FLOOR_LARGE, [o for o, _ in pairs if o["tokens"] > FLOOR_TOKENS]),
    ):
        figures.append(_over_floor(name, limit, cells))
    wrong = [row for row in rows if row["variant"] == "mnnvl_ar" and not row["ok"]]
    figures.append(Figure("right answers", f"{len(wrong)} cells wrong", "none", not wrong if pairs else None))
    return figures


def quantised(rows: Iterable[Row]) -> list[Figure]:
    """Every figure of the ops with a quantised output. A row that stores its norm is held against one that does too."""
    rows = [row for row in rows if _counts_quantised(row)]
    norms = {cell_key(row): row for row in rows if (row["op"], row["variant"]) == ("fused", OURS)}
    cells = [cell for cell in by_cell(rows).values() if cell[0]["op"] in KINDS]
    pairs = [(ours, cell) for cell in cells for ours in cell if ours["variant"] in (OURS, OURS + WITH_NORM)]
    with_norm = [(ours, norms.get(cell_key({**ours, "op": "fused"}))) for ours, _ in pairs if _has_norm(ours)]
    costs = [
        (round(float(ours["p50_us"]) - float(norm["p50_us"]), 3), ours)
        for ours, norm in with_norm
        if norm is not None and ours["tokens"] <= CODES_TOKENS
    ]
    over_vllm = [(ours, [row for row in cell if row["variant"] == VLLM]) for ours, cell in pairs if not _has_norm(ours)]
    over_fused = [
        (ours, [row for row in cell if row["variant"].startswith(FLASHINFER) and _has_norm(row) == _has_norm(ours)])
        for ours, cell in pairs
        if ours["tokens"] <= FUSED_TOKENS
    ]
    wrong = [row for cell in cells for row in cell if is_ours(row["variant"]) and not row["ok"]]
    return [
        _beside_norm(costs),
        _each("quantised, over ours and vLLM's op", _over_best(over_vllm), OVER_VLLM),
        _each(f"quantised, over FlashInfer's fused, T <= {FUSED_TOKENS}", _over_best(over_fused), OVER_FUSED),
        Figure("right quantised answers", f"{len(wrong)} rows wrong", "none", not wrong if cells else None),
    ]


def cpu_cost(us: float | None) -> Figure:
    got = "-" if us is None else f"{us:.2f} us"
    return Figure("CPU cost of an eager fused call", got, f"<= {CPU_US} us", None if us is None else us <= CPU_US)


def workspace(nbytes: int | None) -> Figure:
    name = "workspace for TP8, 2048 tokens, H=8192, bf16"
    got = "-" if nbytes is None else f"{nbytes / (1 << 20):.0f} MiB"
    return Figure(name, got, f"<= {WORKSPACE_MIB} MiB", None if nbytes is None else nbytes <= WORKSPACE_MIB << 20)


def _counts(row: Row) -> bool:
    return bool(is_usual(row) and row["op"] == "fused" and row["dtype"] == "bfloat16")


def _counts_quantised(row: Row) -> bool:
    in_chain = {**row, "context": "chain"}
    return bool(is_usual(in_chain) and row["op"] in ("fused", *KINDS) and row["dtype"] == "bfloat16")


def _has_norm(row: Row) -> bool:
    return str(row["variant"]).endswith(WITH_NORM)


def _ratio(ours: Row, best: Row) -> float:
    return float(best["p50_us"]) / float(ours["p50_us"])


def _over_best(pairs: list[tuple[Row, list[Row]]]) -> list[tuple[float, Row, Row]]:
    """Of each row and its rivals: it beside the quickest of them that is right."""
    right = [(ours, [row for row in rivals if row["ok"]]) for ours, rivals in pairs]
    best = [(ours, min(rivals, key=lambda row: float(row["p50_us"]))) for ours, rivals in right if rivals]
    return [(_ratio(ours, row), ours, row) for ours, row in best]


def _name(row: Row) -> str:
    op = "" if row["op"] == "fused" else f"{row['op']} "
    context = row.get("context", "chain")
    return f"{op}TP{row['tp']} H={row['hidden']} T={row['tokens']}" + ("" if context == "chain" else f" {context}")


def _geomean(ratios: list[float]) -> Figure:
    name, wanted = f"geometric mean of speed-ups, T <= {SMALL_TOKENS}", f">= {SMALL_GEOMEAN}x"
    if not ratios:
        return Figure(name, "-", wanted, None)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return Figure(name, f"{mean:.2f}x over {len(ratios)} cells", wanted, mean >= SMALL_GEOMEAN)


def _each(name: str, cells: list[tuple[float, Row, Row]], wanted: float) -> Figure:
    if not cells:
        return Figure(name, "-", f">= {wanted}x", None)
    short = [cell for cell in cells if cell[0] < wanted]
    ratio, ours, best = min(cells, key=lambda cell: cell[0])
    got = f"{ratio:.2f}x at worst ({_name(ours)}, {best['variant']}), {len(short)} of {len(cells)} cells short"
    return Figure(name, got, f">= {wanted}x", not short)


def _at_most(name: str, found: list[Row], wanted: float) -> Figure:
    if not found:
        return Figure(name, "-", f"<= {wanted} us", None)
    got = min(float(row["p50_us"]) for row in found)
    over = f", {got / wanted - 1:.0%} over" if got > wanted else ""
    return Figure(name, f"{got:.2f} us{over}", f"<= {wanted} us", got <= wanted)


def _beside_norm(costs: list[tuple[float, Row]]) -> Figure:
    name, wanted = f"codes beside the norm, T <= {CODES_TOKENS}", f"<= {CODES_US} us"
    if not costs:
        return Figure(name, "-", wanted, None)
    over = [us for us, _ in costs if us > CODES_US]
    us, worst = max(costs, key=lambda cost: cost[0])
    got = f"{us:.2f} us at worst ({_name(worst)}), {len(over)} of {len(costs)} cells over"
    return Figure(name, got, wanted, not over)


def _over_floor(name: str, wanted: float, cells: list[Row]) -> Figure:
    cells = [row for row in cells if row["floor_us"] is not None]
    if not cells:
        return Figure(name, "-", f"<= {wanted}", None)
    ratios = {_name(row): float(row["p50_us"]) / float(row["floor_us"]) for row in cells}
    short = [ratio for ratio in ratios.values() if ratio > wanted]
    worst = max(ratios, key=lambda cell: ratios[cell])
    got = f"{ratios[worst]:.2f} at worst ({worst}), {len(short)} of {len(cells)} cells short"
    return Figure(name, got, f"<= {wanted}", not short)
