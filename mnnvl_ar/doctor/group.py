"""Under torchrun: the group that was given is examined and tested, and rank 0 hears of every host."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mnnvl_ar.doctor import machine, selftest


def is_given() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def examine(seconds: float) -> tuple[dict[str, Any], int]:
    """Collective. What was found on all hosts (the same on every rank), and this process's rank."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    try:
        group = dist.group.WORLD
        assert group is not None
        rank, size = dist.get_rank(), dist.get_world_size()
        mine = machine.examine()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        index = local if local < len(mine["gpus"]) else 0  # a container may show each rank its own GPU only
        device = torch.device("cuda", index) if mine["gpus"] and torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        result: dict[str, Any] = {"ran": False}
        if seconds > 0:
            try:
                result = selftest.measure(group, device, seconds)
            except Exception as error:
                result = {"ran": True, "ok": False, "error": f"rank {rank}: {error}"}
        told: list[Any] = [None] * size
        dist.all_gather_object(told, (mine, result))
    finally:
        dist.destroy_process_group()
    hosts = {about["host"]: about for about, _ in reversed(told)}
    results = [result for _, result in told]
    worst = next((result for result in results if not result.get("ok", True)), results[0])
    return {"hosts": list(hosts.values()), "world_size": size, "self_test": worst}, rank
