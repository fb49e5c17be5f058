"""Ranks that are threads of this process, each with a stream of its own on one GPU. They run what `common.ranks` runs.

    VirtualRanks(4, "cuda").run(function, argument, ...)

Ranks' kernels wait for each other on one device, so whatever may synchronise it (workspaces, captures) is done between
barriers, by one rank at a time.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from common.ranks import RanksFailed
from common.virtual import VirtualGroup
from mnnvl_ar._library import ops
from mnnvl_ar.diagnosis import raise_fault

PATIENCE = 60.0  # seconds that a rank waits for the others at a barrier


class VirtualRanks:
    """`world_size` virtual ranks. Workspaces are kept until `close`. `multicast`: of all groups (`VirtualGroup`)."""

    def __init__(self, world_size: int, device: str = "cuda", *, multicast: str = "") -> None:
        self.multicast = multicast
        self.world_size, self.device = world_size, torch.device(device, 0 if device == "cuda" else None)
        self.barrier = threading.Barrier(world_size)
        self.lock = threading.Lock()
        self.groups: dict[str, VirtualGroup] = {}
        self.passing: list[VirtualGroup] = []
        self.broken: list[VirtualGroup] = []  # their memory may still be written to
        cuda = self.device.type == "cuda"
        self.streams = [torch.cuda.Stream(self.device) if cuda else None for _ in range(world_size)]

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0, **named: Any) -> list[Any]:
        """`function(rank, *arguments)` on every rank; as `RankPool.run`, but ranks that hang cannot be killed."""
        results: list[Any] = [None] * self.world_size
        problems: dict[int, str] = {}
        self.barrier.reset()

        def work(rank: int) -> None:
            try:
                with torch.cuda.stream(self.streams[rank]):
                    results[rank] = function(VirtualRank(self, rank), *arguments, **named)
            except threading.BrokenBarrierError:
                problems.setdefault(rank, "gave up, since another rank failed")
            except BaseException:
                problems[rank] = traceback.format_exc()
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + timeout
        for rank, thread in enumerate(threads):
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                problems[rank] = f"still running after {timeout:.0f} s"
        if problems:
            self.broken += [*self.groups.values(), *self.passing]
            self.groups.clear()
            self.passing.clear()
            raise RanksFailed(f"{function.__name__} failed", problems)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.passing.clear()
        return results

    def close(self) -> None:
        for group in self.groups.values():
            group.close()
        self.groups.clear()


class VirtualRank:
    """What `common.ranks.Rank` is to a process. There is no process group, so no subgroups."""

    def __init__(self, ranks: VirtualRanks, rank: int) -> None:
        self._ranks, self.rank, self.world_size, self.device = ranks, rank, ranks.world_size, ranks.device
        self.multicast = ranks.multicast

    def workspace(
        self, max_tokens: int = 64, hidden: int = 8192, dtype: Any = None, **options: Any
    ) -> VirtualWorkspace:
        key = repr((max_tokens, hidden, dtype, sorted(options.items())))
        groups = self._ranks.groups

        def make() -> None:
            if key not in groups:
                groups[key] = self._group(max_tokens, hidden, dtype, options)

        self._alone(make)
        return VirtualWorkspace(groups[key], self.rank)

    def new_workspace(
        self, max_tokens: int = 64, hidden: int = 8192, dtype: Any = None, **options: Any
    ) -> VirtualWorkspace:
        self._alone(lambda: self._ranks.passing.append(self._group(max_tokens, hidden, dtype, options)))
        made = VirtualWorkspace(self._ranks.passing[-1], self.rank)
        self.barrier()
        return made

    def _group(self, max_tokens: int, hidden: int, dtype: Any, options: dict[str, Any]) -> VirtualGroup:
        from mnnvl_ar.ops import Strategy

        options = {"deadline": 10.0, "multicast": self.multicast, **options}
        for name in ("transport", "concurrent", "monitor"):  # there is no other
            options.pop(name, None)
        if "strategy" in options:
            options["strategy"] = Strategy[options["strategy"].upper()]
        return VirtualGroup(self.world_size, max_tokens, hidden, dtype or torch.float32, str(self.device), **options)

    def _alone(self, work: Callable[[], Any]) -> None:
        """`work`, by rank 0, while no rank has a call under way."""
        self.barrier()
        if self.rank == 0:
            work()
        self.barrier()

    def set_epoch(self, workspace: VirtualWorkspace, epoch: int) -> None:
        workspace.group.blocks[self.rank][0] = epoch - (1 << 32) if epoch >> 31 else epoch
        self.synchronize()

    def barrier(self) -> None:
        self.synchronize()
        self._ranks.barrier.wait(PATIENCE)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def capture(self, work: Callable[[], Any]) -> Any:
        graph = torch.cuda.CUDAGraph()
        self.barrier()
        with self._ranks.lock, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        self.barrier()
        return graph


class VirtualWorkspace:
    """The part of `mnnvl_ar.Workspace` that checks use."""

    def __init__(self, group: VirtualGroup, rank: int) -> None:
        self.group, self.rank, self.handle = group, rank, group.handles[rank]

    def check(self) -> None:
        raise_fault(self.handle)

    def close(self) -> None:
        ops._workspace_close(self.handle)
