"""What the rank tests share: a workspace made through the front, as a server makes it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from common.ranks import Rank
from compat.stand_in import standing_in
from mnnvl_ar.compat import flashinfer

TOKENS, HIDDEN = 16, 64


@contextlib.contextmanager
def installed(version: str = "0.6.14", **environment: str) -> Iterator[Any]:
    """`flashinfer.comm` of a release with ours in place."""
    limits = {"MNNVL_AR_TIMEOUT": "20", **environment}
    with mock.patch.dict(os.environ, limits), standing_in(version) as comm:
        flashinfer.install()
        yield comm


def create(comm: Any, place: Rank, /, **asked: Any) -> Any:
    """As vLLM calls it; a value of None leaves the argument out."""
    given = {
        "backend": "mnnvl",
        "world_size": place.world_size,
        "rank": place.rank,
        "max_token_num": TOKENS,
        "hidden_dim": HIDDEN,
        "dtype": torch.bfloat16,
        "comm_backend": comm.TorchDistBackend(place.group),
        "group": place.group,
        **asked,
    }
    return comm.create_allreduce_fusion_workspace(**{name: each for name, each in given.items() if each is not None})


def rows(rank: int, tokens: int = 4, hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7 * rank + tokens)
    return torch.randn(tokens, hidden, generator=generator).to(dtype)


def works(workspace: Any, comm: Any, tokens: int = 4) -> bool:
    """Whether a call gives the sum."""
    total = comm.allreduce_fusion(input=rows(workspace.rank, tokens), workspace=workspace, pattern=0)
    wanted = sum(rows(rank, tokens).float() for rank in range(workspace.world_size))
    return torch.equal(total, wanted.to(torch.bfloat16))  # type: ignore[union-attr]


def same_on_all(rank: Rank, told: Any) -> bool:
    everyone: list[Any] = [None] * rank.world_size
    dist.all_gather_object(everyone, told, rank.group)
    return all(each == told for each in everyone)
