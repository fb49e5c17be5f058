"""Virtual ranks: all ranks of a group in one process on one device, each with its own block, thread or stream.

What differs from real ranks: stores stay on the device. What does not: kernels, ring, races between ranks.

`multicast="software"`: as with NVLink multicast, but for the one instruction: a store to the multicast address becomes
one to each block, in a loop (csrc/kernels/fanout.cuh). So own rows come to a rank, too, and slots have room for them.
On a GPU that takes a test build; the host transport only lays out its slots so, and sends to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from mnnvl_ar._library import ops
from mnnvl_ar.ops import Pdl, Strategy
from mnnvl_ar.tuning import LaunchShape, Table, table_for
from mnnvl_ar.workspace import Layout, create


class VirtualGroup:
    def __init__(
        self,
        ranks: int,
        max_tokens: int,
        hidden: int,
        dtype: torch.dtype,
        device: str = "cpu",
        *,
        strategy: int = Strategy.AUTO,
        crossover: int | None = None,
        pdl: int = Pdl.EARLY,
        deadline: float = 20.0,
        hold: float = 0.0,
        max_bytes: int | None = None,
        multicast: str = "",
        **launch: int,
    ) -> None:
        self.device = torch.device(device)
        if multicast not in ("", "software"):
            raise ValueError(f"multicast: got {multicast!r}, wanted '' or 'software'")
        if multicast and self.device.type == "cuda" and not hasattr(ops, "_sabotage"):
            raise ValueError("multicast: in software only a test build has it on a GPU")
        self.ranks = ranks
        table = table_for(self.device, ranks) if crossover is None else Table(crossover)
        room = {"own_too": bool(multicast), "max_bytes": max_bytes}
        slot_bytes = table.slot_bytes(ranks, max_tokens, hidden * dtype.itemsize, strategy, **room)
        self.layout = Layout(slot_bytes)
        self.blocks = [
            torch.empty(self.layout.nbytes // 4, dtype=torch.int32, device=self.device) for _ in range(ranks)
        ]
        self.fill()
        pointers = tuple(block.data_ptr() for block in self.blocks)
        if self.device.type == "cuda":
            self.streams = [torch.cuda.Stream(self.device) for _ in range(ranks)]
            # All ranks' grids must be resident at once, beside those of their next calls, which PDL launches early;
            # and clusters do not fill every SM.
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
            launch.setdefault("max_ctas", max(1, processors * 5 // 16 // ranks))
        self.handles = [
            create(
                pointers,
                rank,
                self.device,
                slot_bytes,
                table,
                multicast_pointer=pointers[rank] if multicast else 0,
                strategy=strategy,
                pdl=pdl,
                deadline=deadline,
                hold=hold,
                concurrent=False,
                launch=LaunchShape(**launch),
            )
            for rank in range(ranks)
        ]

    def fill(self) -> None:
        for block in self.blocks:
            for fill in self.layout.fills:
                word = fill.word - (1 << 32) if fill.word >= 1 << 31 else fill.word
                block[fill.offset // 4 : (fill.offset + fill.nbytes) // 4] = word
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def each(self, work: Callable[[int], object]) -> list[object]:
        """`work(rank)` for every rank: side by side in threads on the host, each on its own stream on a GPU."""
        if self.device.type == "cpu":
            with ThreadPoolExecutor(self.ranks) as pool:
                return list(pool.map(work, range(self.ranks)))
        results = []
        for rank in range(self.ranks):
            self.streams[rank].wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.streams[rank]):
                results.append(work(rank))
        for stream in self.streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)
        return results

    def close(self) -> None:
        for handle in self.handles:
            ops._workspace_close(handle)
