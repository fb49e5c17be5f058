"""One rank's block of a symmetric memory, its views of the peers' blocks, and the proof that they show one memory.

Address space (`reserve`, lives until `close`) and what is mapped there (from `create` to `drop`) are kept apart, so
that memory can go and come back under addresses that captured CUDA graphs hold. In between, a graph that is replayed
would lose the CUDA context; `stand_in` maps something there that ends its calls. Physical memory, and its binding to a
multicast object, need no address: `drop` hands them on to who knows when peers send nothing more to them. Whatever is
taken is noted at once, to be given back in reverse order (`Undo`), so a bring-up may end after any step. Nothing here
is collective: the order of things, and the votes between them, are in `bringup.py`.
"""

from __future__ import annotations

import errno
import logging
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .request import PROBE_BYTES, Fill, Request
from .verbs import LOST, DriverError, Token, Verbs

_log = logging.getLogger("mnnvl_ar")
_ALL = -1  # as the reader of what is written through the multicast address
_PIECE = 2 << 20  # bytes that stand in for all blocks


class Undo:
    """A stack of calls that give something back. `run` never raises: one that fails is logged and the rest still run.

    A failure is not swallowed: an unbind that fails silently is found only later, as a poisoned context (nccl#2115).
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def push(self, call: Callable[..., object], *arguments: Any) -> None:
        self._calls.append((call, arguments))

    def take(self) -> Undo:
        """All that is on it now, as a stack of its own; this one is empty then."""
        taken = Undo()
        taken._calls, self._calls = self._calls, []
        return taken

    def __bool__(self) -> bool:
        """Whether there is anything to give back."""
        return bool(self._calls)

    def run(self) -> None:
        while self._calls:
            call, arguments = self._calls.pop()
            try:
                call(*arguments)
            except Exception as error:
                # While the process ends, the driver is often gone before us, and with it all that it held.
                if not sys.is_finalizing() and getattr(error, "code", "") != "CUDA_ERROR_DEINITIALIZED":
                    _log.warning("giving memory back failed, it may leak until the process ends: %s", error)


class Block:
    """`stride` bytes of our own memory and one view of `stride` bytes for every rank, side by side.

    `driver` is set once it is known what is asked for, and before anything else is called. A multicast address takes
    `multicast_span` bytes, of which the first `stride` are bound: address space costs nothing, memory does.

    is_exposed: a peer may store to our memory through the multicast object, until it is known to have left.
    """

    driver: Verbs

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.stride = self.multicast_span = 0
        self.kind = ""
        self.pointers: tuple[int, ...] = ()
        self.multicast_pointer = 0
        self.handle = 0
        self.is_exposed = self._is_open = self._is_closed = False
        # Addresses, until `close`; what is mapped there; our memory, and its part in a multicast.
        self.space, self.views, self.window, self.instead, self.memory, self.team = (Undo() for _ in range(6))
        self._users = 1  # of the driver: the block, and what `drop` has handed on
        self._lock = threading.Lock()
        self._peers: dict[int, int] = {}

    def reserve(self, stride: int, alignment: int) -> None:
        nbytes = stride * self.world_size
        base = self.driver.reserve(nbytes, alignment)
        self.space.push(self.driver.free, base, nbytes)
        self.stride = stride
        self.pointers = tuple(base + rank * stride for rank in range(self.world_size))

    def create(self, kind: str) -> None:
        self.instead.run()
        self.kind = kind
        self.handle = self.driver.create(self.stride, kind)
        self.memory.push(self.driver.release, self.handle)
        own = self.pointers[self.rank]
        self.driver.map(own, self.stride, self.handle)
        self.views.push(self.driver.unmap, own, self.stride)

    def fill(self, fills: Sequence[Fill]) -> None:
        for part in fills:
            self.driver.fill(self.pointers[self.rank] + part.offset, part.nbytes, part.word)

    def import_peers(self, tokens: Sequence[Token | None]) -> None:
        for rank, token in enumerate(tokens):
            if rank != self.rank:
                assert token is not None
                if token == LOST:
                    raise OSError(errno.EMFILE, f"no room for the file descriptor of rank {rank}")
                handle = self.driver.import_(token, self.kind)
                self.views.push(self._forget, rank)
                self._peers[rank] = handle

    def map_peers(self) -> None:
        for rank, handle in list(self._peers.items()):
            self.driver.map(self.pointers[rank], self.stride, handle)
            self.views.push(self.driver.unmap, self.pointers[rank], self.stride)
            self._forget(rank)  # the mapping keeps the memory; the handle is of no more use

    def drop(self) -> Undo | None:
        """Gives the physical memory back, or what does so: to be run, in any thread, once no peer sends to it any more.

        Over unicast nobody needs to be asked: a peer that maps our memory keeps it alive by that until it drops it,
        too. A binding to a multicast object keeps nothing for those who store to it.
        """
        self.handle = 0  # first: nobody is to look there, should this be cut short
        self.instead.run()
        self.window.run()
        self.views.run()
        if not self.is_exposed:
            self.team.run()
            self.memory.run()
            return None
        self.is_exposed = False
        left = Undo()
        with self._lock:
            self._users += 1
        left.push(self._leave_driver)
        left.push(self.memory.take().run)
        left.push(self.team.take().run)
        return left

    def give_back(self, left: Undo) -> None:
        """Runs what `drop` or `close` handed on, in any thread: another one may be capturing a graph."""
        with self.driver.aside():
            left.run()

    def stand_in(self, fills: Sequence[Fill]) -> bool:
        """In place of memory that was dropped: one small piece of this rank's, over all addresses again and again, so
        that each block begins with the same `fills`. Until `drop` or `create`. Whether there was memory for it; else
        nothing is mapped, as before.

        Nothing stands in at the multicast address: a multimem store to what is no multicast is undefined, and to
        nothing an error. None comes there, as a call that finds its control words broken sends nothing.
        """
        try:
            self._stand_in(fills)
        except (OSError, DriverError) as error:
            self.instead.run()
            _log.warning("nothing stands in for memory that was given back: no graph may be replayed now: %s", error)
            return False
        return True

    def _stand_in(self, fills: Sequence[Fill]) -> None:
        piece = max(_PIECE, self.driver.granularity(""))
        handle = self.driver.create(piece, "")
        try:
            for start in self.pointers:
                for offset in range(0, self.stride, piece):
                    nbytes = min(piece, self.stride - offset)
                    self.driver.map(start + offset, nbytes, handle)
                    self.instead.push(self.driver.unmap, start + offset, nbytes)
            self.fill(fills)
        finally:
            self.driver.release(handle)  # the mappings keep the memory

    def drop_multicast(self) -> None:
        """Gives multicast up for good, where all ranks do and none sends. Its address space is kept until `close`, but
        its address is not handed out."""
        self.is_exposed = False
        self.window.run()
        self.team.run()
        self.multicast_pointer = 0

    def close(self) -> Undo | None:
        """As `drop`, and of the addresses, too."""
        left = self.drop()
        self.space.run()
        self.pointers, self.multicast_pointer = (), 0
        if not self._is_closed:  # a first time that was cut short may have come so far
            self._is_closed = True
            self._leave_driver()
        return left

    def opened(self) -> None:
        """The driver is open, and to be closed with what uses it last."""
        self._is_open = True

    def _leave_driver(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0 and self._is_open
        if last:
            self.driver.close()

    def _forget(self, rank: int) -> None:
        handle = self._peers.pop(rank, None)
        if handle is not None:
            self.driver.release(handle)


class ProbeFailed(OSError):
    """What was written is not what is there."""


class Handshake:
    """The proof that memory is shared: each rank writes to each peer, and each finds in its own block what all wrote.

    A nonce depends on writer, reader and bring-up (`salt`), so that neither a block mapped at the wrong place nor one
    left from an earlier bring-up passes. All writes are over, by vote, before anyone reads, and all of that before the
    content of the probe area is restored.
    """

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
        block.driver.multicast_store(block.multicast_pointer + place, self._nonce(block.rank, _ALL))

    def verify(self, through_multicast: bool = False) -> None:
        """Our own block holds every rank's nonce; then its content is as the fills say again."""
        block = self._block
        area = PROBE_BYTES * block.world_size
        found = block.driver.read(block.pointers[block.rank] + self._request.probe_offset, area)
        for writer in range(block.world_size):
            word = self._nonce(writer, _ALL if through_multicast else block.rank)
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
