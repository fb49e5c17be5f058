"""A made-up run: what bench/run.py would write, from a formula."""

import json
from pathlib import Path
from typing import Any

from bench.cells import Cell, grid
from bench.floor import H200, floor_us

PEERS = {"nccl": 6.0, "symm_mem/one_shot": 3.0, "flashinfer/one_shot": 2.5, "flashinfer/two_shot": 2.6}


def rows(tps: tuple[int, ...] = (2, 8), factor: float = 1.03) -> list[dict[str, Any]]:
    """Ours at `factor` times the floor, peers at PEERS times."""
    found = []
    for cell in grid(tps, ["fused"], ["bfloat16"], [4096, 7168], [1, 8, 64, 128, 1024]):
        found += [row(cell, variant, times) for variant, times in {"mnnvl_ar": factor, **PEERS}.items()]
    return found


def row(cell: Cell, variant: str, times: float, ok: bool = True) -> dict[str, Any]:
    floor = floor_us(cell, H200)
    p50 = floor * times
    return {**cell.key(), "variant": variant, "p50_us": p50, "p99_us": 1.1 * p50, "floor_us": floor, "ok": ok}


def write(file: Path, machine: str, made: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine, "source_digest": "0" * 16, "rows": made}))
