"""The ranks of one cell: the first n processes, or fewer than there are."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

WAIT = datetime.timedelta(hours=2)  # ranks outside a small group wait for the others


@dataclass(frozen=True)
class Team:
    """rank, size: in this group. group: for tensors on `device`, NCCL where each rank has a GPU of its own, else gloo.
    control: gloo, for objects. shared: several ranks have a GPU together, so their kernels run by turns."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup
    control: dist.ProcessGroup
    shared: bool = False

    def gather(self, item: Any) -> list[Any]:
        """Every rank's `item`, by rank. Collective."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.control)
        return items

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def vote(self, failure: str | None) -> str | None:
        """The first failure of any rank, on all ranks alike; None if there is none. Collective."""
        return next((f"rank {rank}: {why}" for rank, why in enumerate(self.gather(failure)) if why is not None), None)

    def all_tensors(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's `tensor`, by rank. Collective."""
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(tensors, tensor, group=self.group)
        return tensors


def join_world(device_kind: str) -> tuple[int, int, torch.device]:
    """(rank, world size, device) of this process, which RANK, WORLD_SIZE and LOCAL_RANK name, as torchrun sets them.
    LOCAL_RANK is the number of its GPU, which it may share with other ranks."""
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local) if device_kind == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # ranks share the cores; threads that wait for each other would spin on them
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=WAIT)
    return rank, size, device


def gpus_of_ranks(device: torch.device) -> list[str]:
    """What tells each rank's GPU from all others, by rank; "" on the host. Collective over the world."""
    own = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def are_shared(gpus: Sequence[str]) -> bool:
    """Whether several ranks have a GPU together, which NCCL refuses, and of which no time says anything."""
    return all(gpus) and len(set(gpus)) < len(gpus)


def make_team(size: int, device: torch.device) -> Team | None:
    """The team of the first `size` ranks; None on the others. Collective over the world."""
    ranks = list(range(size))
    control = dist.new_group(ranks, backend="gloo", timeout=WAIT)
    gpus = gpus_of_ranks(device)[:size]
    group = dist.new_group(ranks, backend="nccl") if all(gpus) and not are_shared(gpus) else control
    if dist.get_rank() >= size:
        return None
    return Team(dist.get_rank(), size, device, group, control, are_shared(gpus))
