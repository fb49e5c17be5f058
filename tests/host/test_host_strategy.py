"""Strategy tables on real ranks: bring-up compares them, and calls go by them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from common.ranks import Rank, rank_pool

ENTRY = {"row_bytes": 256, "strategy": "one_shot", "cluster": 0, "max_ctas": 0, "batch": 0, "lag": 0}
TABLES: dict[str, list[dict[str, Any]]] = {
    "one": [{**ENTRY, "max_tokens": 8}],
    "two": [{**ENTRY, "max_tokens": 8, "strategy": "two_shot"}],
    "shape": [{**ENTRY, "max_tokens": 8, "cluster": 2}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, entries in TABLES.items():
        (tmp_path / name).mkdir()
        content = {"machine": "host", "tp": {"2": {"entries": entries}, "3": {"entries": entries}}}
        (tmp_path / name / "host.json").write_text(json.dumps(content))
    return tmp_path


def tries(rank: Rank, folder: Path, names: list[str], strategies: list[str] | None = None) -> str:
    """Makes a workspace by the table of this rank's name. Returns the error, or whether 8 tokens are summed right
    and how they go."""
    import mnnvl_ar
    from mnnvl_ar._library import ops
    from mnnvl_ar.tuning import files

    with mock.patch.object(files, "FOLDER", folder / names[rank.rank]):
        try:
            ws = rank.new_workspace(9, 64, strategy=(strategies or ["auto"] * rank.world_size)[rank.rank])
        except mnnvl_ar.BringUpError as error:
            return str(error)
    with ws:
        right = torch.full((8, 64), float(rank.world_size))
        summed = mnnvl_ar.ops.all_reduce(torch.ones(8, 64), ws.handle)
        return f"{torch.equal(summed, right)} {list(ops._workspace_choice(ws.handle, 8, 256))[:5]}"


@pytest.mark.parametrize("other", ["two", "shape", "none"])
def test_another_table_on_one_rank_is_the_same_error_on_all(folder: Path, other: str) -> None:
    told = rank_pool(3).run(tries, folder, ["one", other, "one"])
    assert told[0] == told[1] == told[2]
    for words in ("rank 1", "rendezvous", "strategy table differs: rank 1 has", "host.json", "the same workspaces"):
        assert words in told[0]


def test_another_strategy_on_one_rank_is_the_same_error_on_all(folder: Path) -> None:
    told = rank_pool(3).run(tries, folder, ["one"] * 3, ["auto", "auto", "two_shot"])
    assert told[0] == told[1] == told[2]
    assert "strategy differs: rank 2 has 'two_shot', rank 0 has 'auto'" in told[0]


@pytest.mark.parametrize(("name", "taken"), [("one", [0, 0]), ("two", [1, 0]), ("shape", [0, 2]), ("none", [0, 0])])
def test_equal_tables_come_up_and_calls_go_by_them(folder: Path, name: str, taken: list[int]) -> None:
    assert rank_pool(2).run(tries, folder, [name] * 2) == [f"True {[*taken, 0, 0, 0]}"] * 2


def unvoted(rank: Rank, folder: Path, names: list[str]) -> str:
    """`tries` as if bring-up did not compare what the caller wants compared."""
    from mnnvl_ar import workspace
    from mnnvl_ar.memory import Request, SymmetricMemory, allocate

    def blind(group: Any, prepare: Callable[[], Request], **options: Any) -> SymmetricMemory:
        return allocate(group, lambda: replace(prepare(), alike={}), **options)

    with mock.patch.object(workspace, "allocate", blind):
        return tries(rank, folder, names)


def test_control_without_the_comparison_ranks_come_up_with_two_tables(folder: Path) -> None:
    assert rank_pool(2).run(unvoted, folder, ["one", "shape"]) == ["True [0, 0, 0, 0, 0]", "True [0, 2, 0, 0, 0]"]


def test_a_table_that_one_rank_cannot_read_is_the_same_error_on_all_at_once(folder: Path) -> None:
    (folder / "torn").mkdir()
    (folder / "torn" / "host.json").write_text('{"machine":')
    began = time.monotonic()
    told = rank_pool(3).run(tries, folder, ["one", "torn", "one"])
    assert told[0] == told[1] == told[2]
    for words in ("rank 1", "'prepare'", "strategy table host.json: cannot be read"):
        assert words in told[0]
    assert time.monotonic() - began < 10, "nobody waits for the timeout of 60 s"
    assert len(set(rank_pool(3).run(tries, folder, ["one"] * 3))) == 1, "and the next one works"


def lost_device(rank: Rank, victim: int) -> tuple[int, str, str]:
    """A CUDA workspace where torch has lost the device of one rank; no rank has a driver, but none gets that far."""
    import mnnvl_ar

    def index() -> int:
        if rank.rank == victim:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return 0

    lost = mock.patch.multiple("torch.cuda", current_device=index, get_device_name=lambda device: "NVIDIA H200")
    with lost, pytest.raises(mnnvl_ar.BringUpError) as caught:
        mnnvl_ar.Workspace(rank.group, 8, 64, torch.float32, device="cuda")
    return caught.value.rank, caught.value.step, caught.value.cause


@pytest.mark.parametrize("victim", [0, 2])
def test_a_device_that_one_rank_has_lost_is_the_same_error_on_all(victim: int) -> None:
    cause = "RuntimeError: CUDA error: unspecified launch failure"
    assert rank_pool(3).run(lost_device, victim) == [(victim, "prepare", cause)] * 3
