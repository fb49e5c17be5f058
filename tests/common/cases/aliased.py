"""Software multicast in which a block is seen through two mappings, as with a multicast of the driver's: a rank looks,
clears and keeps control words by the first, rows and sums come to it by the second.

    RankPool.run(in_aliased_ranks, 2, check_calls, ...)

Contract
  * One physical block a rank, mapped twice by cuMemMap; no function of multicast is called.
  * Eager calls: what comes from peers comes by the second mapping, own rows by the first, as a workspace has one
    address of its own. Captured calls: all that is sent comes by the second. For that their parameters are changed
    before the graph is instantiated: the own block among `peers`, where a test build looks for it when it sends to all
    (csrc/kernels/fanout.cuh). By that go own signatures and own columns of two-shot, too, which nobody else reads.
  * apart=True, the control: the second mapping is of other memory.
  * Blocks stay mapped until the process ends: of a broken workspace they may still be written to.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch

from common import virtual, virtual_ranks
from common.cases.calls import Call, Prepared
from common.cases.graph_nodes import captured, kernels_of
from common.cases.rules import sabotaged
from common.cases.software import expect_failure
from common.rows import SENTINEL
from mnnvl_ar.memory.cuda_driver import CudaDriver
from mnnvl_ar.workspace import create

# protocol::Group (csrc/protocol/params.h), in words of 64 bits: {rank, ranks}, slot_bytes, orders, block, record,
# multicast, peers.
BLOCK, MULTICAST, PEERS, MOST_RANKS = 3, 5, 6, 72

seconds: dict[int, int] = {}  # first -> second address, of all blocks of this process


class Twice:
    """Memory of a GPU at two addresses, `first` and `second`; `apart`: two memories."""

    def __init__(self, nbytes: int, device: torch.device, apart: bool) -> None:
        driver = _driver_of(device)
        step = driver.granularity("")
        mapped = -(-nbytes // step) * step
        handles = [driver.create(mapped, "") for _ in range(1 + apart)]
        self.nbytes, self.device = nbytes, device
        self.first, self.second = (driver.reserve(mapped, step) for _ in range(2))
        driver.map(self.first, mapped, handles[0])
        driver.map(self.second, mapped, handles[-1])
        for handle in handles:  # the mappings keep the memory
            driver.release(handle)
        seconds[self.first] = self.second

    def words(self, address: int) -> torch.Tensor:
        """What is there, as 32-bit words; no copy."""
        about = {"shape": (self.nbytes // 4,), "typestr": "<i4", "data": (address, False), "version": 3}
        return torch.as_tensor(type("Memory", (), {"__cuda_array_interface__": about})(), device=self.device)


@functools.cache
def _driver_of(device: torch.device) -> CudaDriver:
    driver = CudaDriver()
    driver.open(device.index or 0)
    return driver


class AliasedGroup(virtual.VirtualGroup):
    apart = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.memories: list[Twice] = []
        with mock.patch.object(virtual, "create", self._create):
            super().__init__(*arguments, **options)

    def _create(self, _: tuple[int, ...], rank: int, *rest: Any, **options: Any) -> int:
        if not self.memories:
            self.memories = [Twice(self.layout.nbytes, self.device, self.apart) for _ in range(self.ranks)]
            for which in ("second", "first"):  # what is apart is to look like a block, too
                self.blocks = [memory.words(getattr(memory, which)) for memory in self.memories]
                self.fill()
        own = self.memories[rank].first
        pointers = tuple(own if memory.first == own else memory.second for memory in self.memories)
        return create(pointers, rank, *rest, **{**options, "multicast_pointer": own})


class ApartGroup(AliasedGroup):
    apart = True


def in_aliased_ranks(
    rank: Any,
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    apart: bool = False,
    says: str = "",
    **named: Any,
) -> None:
    """Run by a single process, which makes virtual ranks for this. says: what they must fail with."""
    group = ApartGroup if apart else AliasedGroup
    with (
        mock.patch.object(virtual_ranks, "VirtualGroup", group),
        mock.patch.object(virtual_ranks.VirtualRank, "capture", captured_by_alias),
    ):
        ranks = virtual_ranks.VirtualRanks(world_size, multicast="software")
        expect_failure(says, ranks.run, function, *arguments, timeout=60, **named)
        ranks.close()


def captured_by_alias(rank: Any, work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """As `VirtualRank.capture`, but all that its calls send goes to second addresses."""

    def change(graph: torch.cuda.CUDAGraph) -> None:
        kernels = list(kernels_of(graph))
        assert kernels, "there is no call in it"
        for kernel in kernels:
            kernel.write(sends_by(seconds, kernel.read()))

    return captured(rank, work, change)


def sends_by(seconds: Mapping[int, int], parameters: bytes) -> bytes:
    """A call's parameters, with the second address in place of its own block's among `peers`."""
    words = struct.unpack_from(f"<{len(parameters) // 8}Q", parameters)

    def own_peer(group: int) -> int | None:
        """If a Group may begin at this word: where its own block stands among its peers."""
        at = group + PEERS + (words[group] >> 32) - 1
        is_group = 0 < words[group] >> 32 <= MOST_RANKS and at < len(words) and words[group + BLOCK] in seconds
        return at if is_group and words[group + BLOCK] == words[group + MULTICAST] == words[at] else None

    (at,) = [place for group in range(len(words) - PEERS) if (place := own_peer(group)) is not None]
    return parameters[: 8 * at] + struct.pack("<Q", seconds[words[at]]) + parameters[8 * at + 8 :]


def check_replays(rank: Any, calls: list[Call], options: dict[str, Any], rounds: int = 4) -> None:
    """The calls captured, sixteen to a graph, which is replayed through more turns than the ring has slots."""
    workspace = rank.workspace(**options)
    for start in range(0, len(calls), 16):
        prepared = [Prepared(rank, call) for call in calls[start : start + 16]]
        graph = rank.capture(lambda made=prepared: [each.launch(workspace.handle) for each in made])
        for _ in range(rounds):
            for each in prepared:
                each.refill()
            rank.barrier()
            graph.replay()
            rank.synchronize()
            workspace.check()
            wrong = [line for each in prepared for line in each.wrong()]
            assert not wrong, "\n".join(wrong[:8])


def check_clears(rank: Any, off: str = "") -> None:
    """Of a rank alone: what came by the second mapping is cleared by the first, call for call, and both show the same
    memory. At rest one slot holds rows, of as many words as the call at hand leaves; the others are empty."""
    workspace = sabotaged(rank, off, max_tokens=16, hidden=264)
    group = workspace.group
    memory, control = group.memories[0], group.layout.fills[-1].offset // 4
    views = [memory.words(address) for address in (memory.first, memory.second)]
    for number, (tokens, strategy) in enumerate(((8, 0), (1, 1), (4, 0), (8, 1), (8, 0), (2, 1), (3, 0), (8, 1))):
        call = Prepared(rank, Call(tokens=tokens, hidden=264, strategy=strategy, out="E", seed=number))
        graph = rank.capture(lambda call=call: call.launch(workspace.handle))
        graph.replay()
        rank.synchronize()
        workspace.check()
        assert not call.wrong(), call.wrong()
        first, second = (view.cpu() for view in views)
        assert torch.equal(first, second)
        found = [int(slot.ne(SENTINEL).sum()) for slot in first[control:].view(3, -1)]
        sent = tokens * 264 // 2 * (1 + strategy)  # bf16; of two-shot, rows and sums
        wanted = [sent if slot == number % 3 else 0 for slot in range(3)]
        assert found == wanted, f"call {number}: slots hold {found} words, wanted {wanted}"
    workspace.close()
