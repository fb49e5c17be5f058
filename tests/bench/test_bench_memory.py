"""docs/memory.md: its figures are what the library takes."""

import re
from pathlib import Path

import pytest
import torch

from bench import report
from mnnvl_ar import Strategy
from mnnvl_ar._library import named, ops
from mnnvl_ar.tuning import table_of
from mnnvl_ar.workspace import DEFAULT_MAX_BYTES, Layout, create

VECTOR, TOKENS, VECTORS = 16, 2048, 8192 * 2 // 16
ROW = re.compile(r"^\| \[(\d+), (\d+)\] \| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| (\d+) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def section(root: Path) -> str:
    return (root / "docs/memory.md").read_text()


def slot(ranks: int, tokens: int, row_bytes: int, strategy: Strategy = Strategy.AUTO, **room: object) -> int:
    return table_of("NVIDIA H200", ranks).slot_bytes(ranks, tokens, row_bytes, strategy, **{"own_too": False, **room})


def nbytes(slot_bytes: int) -> str:
    return f"{Layout(slot_bytes).nbytes:,}"


def test_every_shape_of_the_table(section: str) -> None:
    rows = ROW.findall(section)
    assert len(rows) == 7
    for tokens, hidden, ranks, before, whole, bounded, pieces in rows:
        call = int(ranks), int(tokens), int(hidden) * 2
        largest = slot(*call, own_too=True), slot(*call, Strategy.TWO_SHOT)  # room for either strategy
        assert before == nbytes(max(largest))
        assert whole == nbytes(slot(*call))
        small = slot(*call, max_bytes=DEFAULT_MAX_BYTES)
        assert bounded == nbytes(small)
        assert Layout(small).nbytes <= 64 << 20
        handle = create((0,) * call[0], 0, torch.device("cpu"), small, table_of("NVIDIA H200", call[0]))
        assert int(pieces) == named(ops._workspace_choice, handle, *call[1:])["pieces"]


def test_what_a_multicast_needs(section: str) -> None:
    assert f"[512, 4096] at TP2 takes {nbytes(slot(2, 512, 8192, own_too=True))}." in section


def test_the_parts_of_a_slot_add_up(section: str) -> None:
    stages = [8 * TOKENS * (VECTORS // 8) * VECTOR, TOKENS * VECTORS * VECTOR]
    whole = slot(8, TOKENS, VECTORS * VECTOR)
    assert sum(stages) == whole
    assert all(f"| | {stage:,} |" in section for stage in stages)
    assert f"| 3 x {whole:,} |" in section
    assert Layout(whole).nbytes == 16_384 + 3 * whole
    assert f"What each byte of {nbytes(whole)} is for" in section


def test_the_parts_of_the_control_words_add_up(section: str) -> None:
    canaries = sum(named(ops._block_canaries)["nbytes"])
    assert 32 + 2 * 3 * 72 * 16 + 2 * 72 * 16 + canaries == 16_384
    assert f"| | {canaries:,} | canaries in between |" in section


def test_what_the_report_judges() -> None:
    assert report.workspace_bytes() == 64 << 20
