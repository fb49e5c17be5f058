"""docs/performance.md, "Memory": its figures are what the library takes."""

from pathlib import Path

import pytest

from bench import report
from mnnvl_ar import Strategy
from mnnvl_ar._library import named, ops
from mnnvl_ar.tuning import table_of
from mnnvl_ar.workspace import Layout

VECTOR, TOKENS, VECTORS = 16, 2048, 8192 * 2 // 16


@pytest.fixture(scope="module")
def section(root: Path) -> str:
    return (root / "docs/performance.md").read_text().split("\n## Memory\n")[1]


def slot(ranks: int, tokens: int, row_bytes: int, strategy: Strategy, machine: str = "NVIDIA H200") -> int:
    return table_of(machine, ranks).slot_bytes(ranks, tokens, row_bytes, strategy)


def test_the_parts_of_a_slot_add_up(section: str):
    stages = [8 * TOKENS * (VECTORS // 8) * VECTOR, TOKENS * VECTORS * VECTOR]
    of_auto = slot(8, TOKENS, VECTORS * VECTOR, Strategy.AUTO)
    assert sum(stages) == of_auto
    assert all(f"| | {stage:,} |" in section for stage in stages)
    assert f"| 3 x {of_auto:,} |" in section
    assert Layout(of_auto).nbytes == 16_384 + 3 * of_auto == report.workspace_bytes()
    assert f"takes {report.workspace_bytes():,} bytes of each GPU" in section


def test_the_parts_of_the_control_words_add_up(section: str):
    canaries = sum(named(ops._block_canaries)["nbytes"])
    assert 28 + 3 * 72 * 16 + 2 * 72 * 16 + canaries == 16_384
    assert f"canaries in between {canaries:,} |" in section


def test_the_other_workspaces(section: str):
    one_shot = slot(8, TOKENS, VECTORS * VECTOR, Strategy.ONE_SHOT)
    assert one_shot == 8 * TOKENS * VECTORS * VECTOR
    assert f"= {one_shot:,} bytes, and takes {Layout(one_shot).nbytes:,}." in section
    rack = slot(72, TOKENS, VECTORS * VECTOR, Strategy.AUTO, "NVIDIA GB200")
    assert f"TP72 takes {Layout(rack).nbytes:,}." in " ".join(section.split())
    few = slot(8, 128, 7168 * 2, Strategy.AUTO)
    assert f"are {Layout(few).nbytes:,}." in section
