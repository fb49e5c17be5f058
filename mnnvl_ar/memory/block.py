"""One rank's share of a symmetric memory, and its views of the peers' shares. Nothing here is collective.

Address space (`reserve`, lives until `close`) and physical memory (`create`, lives until `drop`) are kept apart, so
that memory can go and come back under addresses that captured CUDA graphs have baked in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .undo import Undo
from .verbs import Token, Verbs


@dataclass(frozen=True)
class Fill:
    """Initial content: the 32-bit `word`, repeated over `nbytes` bytes from `offset`. Both are multiples of 4."""

    offset: int
    nbytes: int
    word: int


class Block:
    """`stride` bytes of our own memory and one view of `stride` bytes for every rank, side by side."""

    def __init__(self, driver: Verbs, rank: int, world_size: int) -> None:
        self.driver, self.rank, self.world_size = driver, rank, world_size
        self.stride = self.alignment = 0
        self.kind = ""
        self.pointers: tuple[int, ...] = ()
        self.multicast_pointer = 0
        self.handle = 0
        self.space, self.memory, self.multicast = Undo(), Undo(), Undo()
        self._peers: dict[int, int] = {}

    def reserve(self, stride: int, alignment: int) -> None:
        nbytes = stride * self.world_size
        base = self.driver.reserve(nbytes, alignment)
        self.space.push(self.driver.free, base, nbytes)
        self.stride, self.alignment = stride, alignment
        self.pointers = tuple(base + rank * stride for rank in range(self.world_size))

    def create(self, kind: str) -> None:
        self.kind = kind
        self.handle = self.driver.create(self.stride, kind)
        self.memory.push(self.driver.release, self.handle)
        own = self.pointers[self.rank]
        self.driver.map(own, self.stride, self.handle)
        self.memory.push(self.driver.unmap, own, self.stride)

    def fill(self, fills: Sequence[Fill]) -> None:
        for part in fills:
            self.driver.fill(self.pointers[self.rank] + part.offset, part.nbytes, part.word)

    def import_peers(self, tokens: Sequence[Token | None]) -> None:
        for rank, token in enumerate(tokens):
            if rank != self.rank:
                assert token is not None
                handle = self.driver.import_(token, self.kind)
                self.memory.push(self._forget, rank)
                self._peers[rank] = handle

    def map_peers(self) -> None:
        for rank, handle in list(self._peers.items()):
            self.driver.map(self.pointers[rank], self.stride, handle)
            self.memory.push(self.driver.unmap, self.pointers[rank], self.stride)
            self._forget(rank)  # the mapping keeps the memory; the handle is of no more use

    def drop(self) -> None:
        """Gives the physical memory back. Peers that still map it keep it alive until they drop it too."""
        self.multicast.run()
        self.memory.run()
        self.handle = 0

    def drop_multicast(self) -> None:
        """Multicast is given up for good; its address space is kept until `close`, but nobody is told of it."""
        self.multicast.run()
        self.multicast_pointer = 0

    def close(self) -> None:
        self.drop()
        self.space.run()
        self.pointers, self.multicast_pointer = (), 0

    def _forget(self, rank: int) -> None:
        handle = self._peers.pop(rank, None)
        if handle is not None:
            self.driver.release(handle)
