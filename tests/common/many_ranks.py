"""More virtual ranks than a GPU has hardware queues: a call of all of them is one CUDA graph of kernels without edges.

On streams 72 ranks cannot meet: there are 32 queues at most (CUDA_DEVICE_MAX_CONNECTIONS), and a kernel behind one that
waits for it in the same queue never starts. Kernels of a graph that have no predecessor may all start at once, and do
where the GPU has room. So each rank's call is one CTA, and one piece.

    with ManyRanks(72, tokens=8, hidden=3584, dtype="bf16") as ranks:
        ranks.run(calls)

Contract
  * run(): every rank makes the calls in that order, `rounds` times; returns what is wrong, bit for bit ([] if nothing).
    A later round starts with outputs poisoned and inputs put back.
  * That a call ends at all shows that all of its kernels were resident at once: none can end before every other one has
    sent its rows, which it does when it runs. Otherwise the deadline, `deadline` seconds, ends it, and run() raises
    `MnnvlArError` naming the rank that did not come. in_line=True makes it so: an edge between each rank and the next.
  * On the host ranks are threads; they take the same calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from common.cases.calls import Call, Prepared
from common.rows import DTYPES
from common.streams import own_streams
from common.virtual import VirtualGroup
from mnnvl_ar.diagnosis import raise_fault
from mnnvl_ar.ops import Pdl, Strategy

POISON = 3.0
GROUPS_A_CTA = 14  # of 32 vectors: what 512 threads hold of a row, two warps having none (csrc/launch/limits.h)
GROUP_BYTES = 512


def fits_one_cta(hidden: int, dtype: str) -> bool:
    return hidden * DTYPES[dtype].itemsize <= GROUPS_A_CTA * GROUP_BYTES


@dataclass(frozen=True)
class One:
    """A rank as `Prepared` knows it."""

    rank: int
    world_size: int
    device: torch.device


class ManyRanks:
    def __init__(
        self,
        ranks: int,
        tokens: int,
        hidden: int,
        dtype: str,
        device: str = "cuda:0",
        *,
        deadline: float = 2.0,
        multicast: str = "",
    ) -> None:
        if not fits_one_cta(hidden, dtype):
            raise ValueError(f"hidden: got {hidden}, wanted a row that one CTA holds")
        launch = {"max_ctas": 1, "cluster": 1} if device != "cpu" else {}
        # Made for one-shot, the larger of the two, so that both may be forced and neither takes two pieces.
        self.group = VirtualGroup(
            ranks,
            tokens,
            hidden,
            DTYPES[dtype],
            device,
            strategy=Strategy.ONE_SHOT,
            pdl=Pdl.OFF,
            deadline=deadline,
            multicast=multicast,
            **launch,
        )
        if self.group.device.type == "cuda":  # an edge for each stream that two of them share, or the capture has
            self.group.streams = own_streams(ranks, self.group.device)
        self.ones = [One(rank, ranks, self.group.device) for rank in range(ranks)]

    def __enter__(self) -> ManyRanks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.group.close()

    def run(self, calls: list[Call], rounds: int = 1, *, in_line: bool = False) -> list[str]:
        prepared = [[Prepared(one, call) for one in self.ones] for call in calls]
        launches = [self._launch_of(each, in_line) for each in prepared]
        wrong: list[str] = []
        for _ in range(rounds):
            for each in prepared:
                for rank in each:
                    rank.refill()
                    for output in rank.outputs:
                        if all(output.data_ptr() != mine.data_ptr() for mine in (rank.x, rank.residual)):
                            output.fill_(POISON)
            for launch in launches:  # back to back, so that calls differ from one slot of the ring to the next
                launch()
            if self.group.device.type == "cuda":
                torch.cuda.synchronize(self.group.device)
            for handle in self.group.handles:
                raise_fault(handle)
            wrong += [line for each in prepared for rank in each for line in rank.wrong()]
        return wrong

    def _launch_of(self, prepared: list[Prepared], in_line: bool) -> Any:
        def work(rank: int) -> None:
            prepared[rank].launch(self.group.handles[rank])

        if self.group.device.type == "cpu":
            return lambda: self.group.each(work)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            if in_line:
                for rank in range(self.group.ranks):
                    work(rank)
            else:
                self.group.each(work)
        return graph.replay
