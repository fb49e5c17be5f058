"""The tables of docs/benchmarks.md of a world of one: nothing is sent there, so they show what a call itself takes,
beside kernels that do less in the same place."""

from __future__ import annotations

from typing import Any

from bench import results
from bench.results import Row

CONTEXTS = {"gemm": "between GEMMs", "chain": "in a chain of calls alone"}
COLUMNS = {
    results.OURS: "**ours**",
    f"{results.OURS}/pdl_off": "off",
    f"{results.OURS}/pdl_late": "late",
    f"{results.OURS}/pdl_early": "early",
    f"{results.YARDSTICK}/trivial": "stores a word",
    f"{results.YARDSTICK}/copy": "copies the rows",
    f"{results.YARDSTICK}/add_norm": "adds, norms",
}


def is_alone(run: dict[str, Any]) -> bool:
    return {row["tp"] for row in run["rows"]} == {1}


def section(runs: dict[str, dict[str, Any]], today: str) -> str:
    """A table of each run that is of a world of one; empty where there is none."""
    return "\n\n".join(_table(run, today) for run in runs.values() if is_alone(run))


def _table(run: dict[str, Any], today: str) -> str:
    cells = results.by_cell(run["rows"])
    lines = [
        f"{run['machine']}. {results.sources_told(run, today)}",
        "",
        f"| | hidden | tokens | {' | '.join(COLUMNS.values())} |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for rows in cells.values():
        found = {row["variant"]: row for row in rows}
        where = f"{rows[0]['op']}, {_context(rows[0])} | {rows[0]['hidden']} | {rows[0]['tokens']}"
        lines.append(f"| {where} | {' | '.join(_entry(found.get(variant)) for variant in COLUMNS)} |")
    return "\n".join(lines)


def _context(row: Row) -> str:
    unusual = [word for name, word in (("l2", "cold"), ("mode", "eager")) if row.get(name) == word]
    unusual += [row["dtype"]] if row["dtype"] != "bfloat16" else []
    return ", ".join([CONTEXTS[row.get("context", "chain")], *unusual])


def _entry(row: Row | None) -> str:
    return "-" if row is None else f"{row['p50_us']:.2f}" + ("" if row["ok"] else " WRONG")
