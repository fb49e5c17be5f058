"""Calls served, as the device counts them: pieces, sleep, the file that MNNVL_AR_CALLS asks for."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from common.cases.pieces import pieces_of
from common.ranks import Rank, rank_pool
from compat.front import create, installed, rows, works
from mnnvl_ar import ops
from mnnvl_ar.compat import counted
from mnnvl_ar.errors import MnnvlArError


def counts(rank: Rank) -> list[int]:
    """Of a workspace after: nothing, three calls, one more in pieces, and one after sleep."""
    workspace = rank.new_workspace(64, 64, torch.float32, max_bytes=64 << 10)
    found = [workspace.calls]
    for _ in range(3):
        ops.all_reduce(torch.ones(2, 64), workspace.handle)
    found.append(workspace.calls)
    assert pieces_of(workspace, 2048, 64 * 4, 1) > 1
    ops.all_reduce(torch.ones(2048, 64), workspace.handle)
    found.append(workspace.calls)
    rank.barrier()
    workspace.sleep()
    with pytest.raises(MnnvlArError, match="calls: this workspace is asleep"):
        _ = workspace.calls
    workspace.wake(rank.group)
    ops.all_reduce(torch.ones(2, 64), workspace.handle)
    found.append(workspace.calls)
    workspace.close()
    with pytest.raises(MnnvlArError, match="closed"):
        _ = workspace.calls
    return found


def test_calls_are_counted_by_the_device() -> None:
    assert rank_pool(2).run(counts) == [[0, 3, 4, 1]] * 2


def served(rank: Rank, folder: str) -> dict[str, Any]:
    """The file after two calls, sleep and one more call, and once the workspace is closed."""
    with installed(MNNVL_AR_CALLS=folder) as comm:
        workspace = create(comm, rank)
        assert works(workspace, comm)
        norm = {"residual_in": rows(0), "rms_gamma": torch.ones(rows(0).shape[-1], dtype=torch.bfloat16)}
        comm.allreduce_fusion(input=rows(rank.rank), workspace=workspace, pattern=1, **norm)
        file = Path(folder) / f"{os.getpid()}.json"
        counted.write(Path(folder))
        before = json.loads(file.read_text())
        rank.barrier()
        workspace.checkpoint_prepare()
        workspace.checkpoint_restore(comm.TorchDistBackend(rank.group))
        assert works(workspace, comm)
        counted.write(Path(folder))
        rank.barrier()
        workspace.destroy()
        counted.write(Path(folder))
        after = json.loads(file.read_text())
    return {"before": before, "after": after}


def test_each_process_says_what_it_served(tmp_path: Path) -> None:
    for rank, told in enumerate(rank_pool(2, env={"MNNVL_AR_TEST": "counted"}).run(served, str(tmp_path))):
        assert (told["before"]["rank"], told["before"]["world_size"]) == (rank, 2)
        assert told["before"]["made"] == {"0": 1, "1": 1}
        assert [each["calls"] for each in told["before"]["workspaces"]] == [2]
        assert told["after"]["made"] == {"0": 2, "1": 1}
        (workspace,) = told["after"]["workspaces"]
        assert (workspace["calls"], workspace["transport"]) == (3, "host")
        assert workspace["nbytes"] > 0


def written_by_several(rank: Rank, folder: str) -> int:
    """How many of eight threads could write, many times, side by side."""
    with installed(MNNVL_AR_CALLS=folder) as comm:
        workspace = create(comm, rank)
        with ThreadPoolExecutor(8) as threads:
            done = [threads.submit(lambda: [counted.write(Path(folder)) for _ in range(50)]) for _ in range(8)]
        workspace.destroy()
    return sum(each.exception() is None for each in done)


def test_threads_do_not_take_each_others_draft(tmp_path: Path) -> None:
    assert rank_pool(2, env={"MNNVL_AR_TEST": "counted"}).run(written_by_several, str(tmp_path)) == [8, 8]


def counting_by_itself(rank: Rank, folder: str) -> bool:
    """Whether the thread finds a call that was made after it had begun."""
    with installed(MNNVL_AR_CALLS=folder) as comm:
        workspace = create(comm, rank)
        file, end = Path(folder) / f"{os.getpid()}.json", time.monotonic() + 60
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert works(workspace, comm)
        while time.monotonic() < end:
            if json.loads(file.read_text())["workspaces"][-1]["calls"] == 1:
                return True
            time.sleep(0.05)
    return False


def test_the_file_is_kept_up_to_date(tmp_path: Path) -> None:
    assert rank_pool(2, env={"MNNVL_AR_TEST": "counting"}).run(counting_by_itself, str(tmp_path)) == [True, True]


def silent(rank: Rank, folder: str) -> list[str]:
    with installed() as comm:
        create(comm, rank).destroy()
    return os.listdir(folder)


def test_nobody_counts_unless_asked(tmp_path: Path) -> None:
    assert rank_pool(2).run(silent, str(tmp_path)) == [[], []]
