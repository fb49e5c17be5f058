"""Ranks as the tests use them: `mnnvl_ar.ranks`, whose functions are given workspaces as well.

    pool = rank_pool(4)                        # 4 host ranks; kept and shared until the end of the session
    sums = pool.run(function, argument, ...)   # [function(rank, argument, ...) of each rank]

`function` is a top-level function; `rank` is its rank's `Rank`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mnnvl_ar import ranks
from mnnvl_ar.ranks import GRACE, RanksFailed, Running
from tools.multicast import keep_multicast_off

__all__ = ["GRACE", "ROOT", "TEST_LIBRARY", "Rank", "RankPool", "RanksFailed", "Running", "close_pools", "rank_pool"]

ROOT = Path(__file__).parent.parent.parent
TEST_LIBRARY = ROOT / "tests" / "_C_test.so"
# Modules of tests import it, which took a third of a rank's start.
PRELOADED = [*ranks._PRELOADED, "pytest"]
ranks._PRELOADED = PRELOADED


class Rank(ranks.Rank):
    """What a function that runs on all ranks is given. See also `common.virtual_ranks.VirtualRank`, which is used
    alike.

    group: the gloo group of all ranks.
    """

    def __init__(self, *place: Any) -> None:
        keep_multicast_off()
        torch.set_num_threads(1)
        super().__init__(*place)
        self.group = self.join()
        self._workspaces: dict[str, Any] = {}

    def within(self, members: list[int]) -> Rank | None:
        """This rank among `members` alone, whose ranks are then 0, 1, ...; None if it is not one of them. Collective
        over all ranks."""
        group = dist.new_group(members)
        if self.rank not in members:
            return None
        inner = copy.copy(self)
        inner.rank, inner.world_size, inner.group, inner._workspaces = group.rank(), len(members), group, {}
        return inner

    def workspace(self, max_tokens: int = 64, hidden: int = 8192, dtype: Any = None, **options: Any) -> Any:
        """A `mnnvl_ar.Workspace` over all ranks, made on the first call with these arguments and kept."""
        key = repr((max_tokens, hidden, dtype, sorted(options.items())))
        if key not in self._workspaces:
            self._workspaces[key] = self.new_workspace(max_tokens, hidden, dtype, **options)
        return self._workspaces[key]

    def new_workspace(self, max_tokens: int = 64, hidden: int = 8192, dtype: Any = None, **options: Any) -> Any:
        """The same, but made anew; the caller closes it."""
        import mnnvl_ar

        options = {"deadline": 20.0, "device": self.device, **options}
        return mnnvl_ar.Workspace(
            options.pop("group", self.group), max_tokens, hidden, dtype or torch.float32, **options
        )

    def set_epoch(self, workspace: Any, epoch: int) -> None:
        """Makes `epoch` the number of the next call. It must be the present one modulo 3, and the same on all ranks."""
        workspace._memory._block.driver.fill(workspace._memory.pointers[workspace.rank], 4, epoch)

    def forget_workspaces(self) -> None:
        """Closes the kept workspaces."""
        while self._workspaces:
            self._workspaces.popitem()[1].close()

    def close(self) -> None:
        self.forget_workspaces()
        super().close()

    def barrier(self) -> None:
        self.synchronize()
        dist.barrier(self.group)

    def synchronize(self) -> None:
        """Waits for this rank's calls."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def capture(self, work: Callable[[], Any]) -> Any:
        """`work` captured on a side stream, as a CUDA graph that is ready to be replayed."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph


class RankPool(ranks.RankPool):
    """library: the build of mnnvl_ar that these ranks load, the release one if None."""

    rank_type = Rank

    def __init__(
        self, world_size: int, device: str = "cpu", env: dict[str, str] | None = None, library: Path | None = None
    ) -> None:
        chosen = {} if library is None else {"MNNVL_AR_LIBRARY": str(library)}
        super().__init__(world_size, device, {**(env or {}), **chosen})


_pools: dict[Any, RankPool] = {}
_lock = threading.Lock()


def rank_pool(
    world_size: int, device: str = "cpu", *, library: Path | None = None, env: dict[str, str] | None = None
) -> RankPool:
    """The session's pool of this kind. `close_pools` ends them all."""
    key = (world_size, device, library, tuple(sorted((env or {}).items())))
    with _lock:
        if key not in _pools:
            _pools[key] = RankPool(world_size, device, env, library)
        return _pools[key]


def close_pools() -> None:
    """Ends every pool made by `rank_pool`."""
    with _lock:
        for pool in _pools.values():
            pool.close()
        _pools.clear()
