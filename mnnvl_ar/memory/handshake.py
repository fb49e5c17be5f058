"""The proof that memory is shared: each rank writes to each peer, and each finds in its own block what all wrote.

A nonce depends on writer, reader and bring-up, so that neither a block mapped at the wrong place nor one left from an
earlier bring-up passes. All writes are over, by vote, before anyone reads, and all of that before content is restored.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from .block import Block, Fill
from .request import PROBE_BYTES, Request

EVERYONE = -1  # the reader of what is written through the multicast address


class ProbeFailed(OSError):
    """What was written is not what is there."""


class Handshake:
    """The two halves of one proof; a vote of all ranks lies between them."""

    def __init__(self, block: Block, request: Request, salt: str) -> None:
        self._block, self._request, self._salt = block, request, salt

    def write(self) -> None:
        """To every rank's block, through our own mapping of it; and read back through the same."""
        block = self._block
        place = self._request.probe_offset + PROBE_BYTES * block.rank
        for reader, pointer in enumerate(block.pointers):
            word = self._nonce(block.rank, reader)
            block.driver.fill(pointer + place, PROBE_BYTES, word)
            found = block.driver.read(pointer + place, PROBE_BYTES)
            _compare(found, word, f"what rank {block.rank} wrote to rank {reader} reads back otherwise")

    def write_multicast(self) -> None:
        block = self._block
        place = self._request.probe_offset + PROBE_BYTES * block.rank
        block.driver.fill(block.multicast_pointer + place, PROBE_BYTES, self._nonce(block.rank, EVERYONE))

    def verify(self, through_multicast: bool = False) -> None:
        """Our own block holds every rank's nonce; then its content is as the fills say again."""
        block = self._block
        area = PROBE_BYTES * block.world_size
        found = block.driver.read(block.pointers[block.rank] + self._request.probe_offset, area)
        for writer in range(block.world_size):
            word = self._nonce(writer, EVERYONE if through_multicast else block.rank)
            mine = found[PROBE_BYTES * writer : PROBE_BYTES * (writer + 1)]
            _compare(mine, word, f"what rank {writer} wrote did not arrive at rank {block.rank}")
        self.restore()

    def restore(self) -> None:
        """Our own block is as the fills say; 0 in the probe area where they say nothing."""
        start, area = self._request.probe_offset, PROBE_BYTES * self._block.world_size
        self._block.fill([Fill(start, area, 0), *_within(self._request.fills, start, area)])

    def _nonce(self, writer: int, reader: int) -> int:
        return zlib.crc32(f"{self._salt}:{writer}:{reader}".encode())


def _compare(found: bytes, word: int, what: str) -> None:
    wanted = word.to_bytes(4, "little") * (PROBE_BYTES // 4)
    if found != wanted:
        raise ProbeFailed(f"{what} (wanted {wanted.hex()}, found {found.hex()})")


def _within(fills: Iterable[Fill], offset: int, nbytes: int) -> list[Fill]:
    """The parts of the fills that lie inside an area."""
    parts = []
    for fill in fills:
        start, end = max(fill.offset, offset), min(fill.offset + fill.nbytes, offset + nbytes)
        if start < end:
            parts.append(Fill(start, end - start, fill.word))
    return parts
