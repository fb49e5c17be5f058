"""A workspace of the front is no value: its copies are itself, whoever makes them, and none leaves the process."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from common.ranks import Rank, rank_pool
from compat.front import create, installed, works
from mnnvl_ar.compat.group_calls import GroupCalls

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of what has it": lambda workspace: copy.deepcopy({"layers": [workspace]})["layers"][0],
    "deepcopy of what is ours": lambda workspace: copy.deepcopy(GroupCalls(workspace, 1.0)).workspace,
}
SENT: dict[str, Callable[[Any], Any]] = {
    "pickle": pickle.dumps,
    "pickle of what is ours": lambda workspace: pickle.dumps(GroupCalls(workspace, 1.0)),
    "torch.save": lambda workspace: torch.save({"workspace": workspace}, os.devnull),
}


def outlives(rank: Rank, how: str) -> None:
    """A copy works when the name that it was made of is gone, sleeps and wakes, and what ends one ends both."""
    with installed() as comm:
        workspace = create(comm, rank)
        copied = COPIES[how](workspace)
        del workspace
        gc.collect()
        assert works(copied, comm), "it went with what it is a copy of"
        rank.barrier()
        again = COPIES[how](copied)
        again.checkpoint_prepare()
        assert copied._shared.workspace.is_asleep, "its copy did not put it to sleep"
        again.checkpoint_restore(comm.TorchDistBackend(rank.group))
        assert works(copied, comm)
        rank.barrier()
        again.destroy()
        assert copied._destroyed, "it does not know that its copy was destroyed"
        assert COPIES[how](copied)._destroyed
        copied.destroy()


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_the_workspace(how: str) -> None:
    rank_pool(2).run(outlives, how)


def shares(rank: Rank) -> None:
    """What counts the users of a group's workspace is one, too: two would each close it when theirs are gone."""
    with installed() as comm:
        workspace, other = create(comm, rank), create(comm, rank)
        shared = workspace._shared
        assert shared is other._shared
        assert copy.copy(shared) is copy.deepcopy(shared) is shared
        with pytest.raises(TypeError, match="a Shared cannot be pickled"):
            pickle.dumps(shared)
        copy.copy(workspace).destroy()
        copy.copy(workspace).destroy()  # gives back no more than its own
        assert works(other, comm)
        rank.barrier()
        other.destroy()


def test_what_workspaces_share_is_one() -> None:
    rank_pool(2).run(shares)


def refuses(rank: Rank, how: str) -> None:
    with installed() as comm:
        workspace = create(comm, rank)
        with pytest.raises(TypeError, match="a FusionWorkspace cannot be pickled"):
            SENT[how](workspace)
        assert works(workspace, comm)
        rank.barrier()
        workspace.destroy()


@pytest.mark.parametrize("how", SENT)
def test_it_cannot_be_sent(how: str) -> None:
    rank_pool(2).run(refuses, how)
