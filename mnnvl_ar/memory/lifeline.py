"""What a bring-up leaves open: a connection from each rank to rank 0, by which all ranks know at once who is gone.

Contract
  * A connection ends with the process that has it, however that ends: the kernel sees to it, of another host too.
  * Who leaves in good order says so first: why, and the epoch of the call that would have been its next. An end without
    a word is a death.
  * Rank 0 sees the end of every other rank, and passes it on; all see the end of rank 0. That is the last news: without
    rank 0 there are no more calls to complete.
  * Who leaves may stay to listen, until it knows that all have left (`parting.py`); rank 0 passes on meanwhile. Who has
    left sends nothing more to any rank's memory. A process that ends without that word may do so until its GPU is taken
    from it, which the end of its connection only announces: it counts as gone a while later.
  * Where nothing is heard any more (a network, a host without power), nobody is said to be dead: a warning is logged,
    and only the deadline tells.
  * A forked child has no part in it: its copies of the connections are closed in it, or they would outlive the parent.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.util
import os
import select
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from .connection import Connection, ConnectionClosed, Message, close_all

# How a rank goes. The numbers of csrc/diagnosis/notes.h, too.
DIED, CLOSED, ASLEEP, CHECKPOINT, RECOVERS, EXITED = range(6)
_LAST_SECONDS = 5.0  # from the end of a connection until nothing of that process runs on its GPU
_SEND_SECONDS = 1.0  # the kernel takes a message this small at once, unless the other end reads nothing any more

_open: set[Lifeline] = set()  # held here: a connection must not end because nobody holds its workspace any more


@dataclass(frozen=True)
class Gone:
    """A rank that is gone. how: `DIED`, ... `EXITED`; next: the epoch of the first call that it did not make, or -1."""

    rank: int
    how: int
    next: int = -1


class Lifeline:
    """One rank's end. `connections`: to every other rank on rank 0, to rank 0 on the others; owned from now on.
    `heard`: what has come over them already, by the rank at the other end.

    next_epoch: what this rank says when it leaves, as in `Gone`; to be set by whoever knows.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        connections: Mapping[int, Connection],
        heard: Mapping[int, Message] | None = None,
    ) -> None:
        self.rank, self.next_epoch = rank, _unknown
        self._connections, self._said, self._gone = dict(connections), dict[int, Gone](), list[Gone]()
        # Of each other rank, from when on (time.monotonic) nothing of it runs any more; None: not known.
        self._quiet: dict[int, float | None] = {other: None for other in range(world_size) if other != rank}
        # Leaving is another thread's than looking; or the same one's, where collecting garbage closes a workspace.
        self._lock = threading.RLock()
        self._unsaid: list[str] = []  # what the log is to be told, by whoever may wait for it
        self._has_left = self._has_told = False
        for connection in self._connections.values():
            connection.notice_silence()
        for other, message in (heard or {}).items():
            self._take(other, message, [])
        _open.add(self)
        _be_told_of_the_end()

    @property
    def others(self) -> list[int]:
        """All ranks but this one."""
        return list(self._quiet)

    @property
    def has_left(self) -> bool:
        """Whether this rank has."""
        return self._has_left

    def look(self) -> list[Gone]:
        """Who is gone and not yet `settled`, in the order in which it was heard. Never waits."""
        with self._lock:
            for rank in self._ready():
                self._hear(rank)
            return list(self._gone)

    def warnings(self) -> list[str]:
        """What `look` has found that no error tells, each once."""
        with self._lock:
            unsaid, self._unsaid = self._unsaid, []
            return unsaid

    def settled(self, gone: Gone) -> None:
        """There is nothing more to do about this one."""
        with self._lock:
            self._gone.remove(gone)

    def all_have_left(self) -> bool:
        """Whether this rank and all others have: then nobody sends any more. Of what `look` has heard."""
        with self._lock:
            return self._has_left and not self._staying()

    def staying(self) -> list[int]:
        """The other ranks that have not left, as far as `look` has heard."""
        with self._lock:
            return self._staying()

    def _staying(self) -> list[int]:
        now = time.monotonic()
        return [rank for rank, since in self._quiet.items() if since is None or now < since]

    def leave(self, how: int, stay: bool = False) -> None:
        """Says so to all ranks, and ends the connections, unless it is to `stay` and listen; with `EXITED` the end of
        the process does that, whose calls may still run. Idempotent, never raises."""
        with self._lock:
            if self._has_told:
                return
            self._has_left = True
            epoch = -1
            with contextlib.suppress(Exception):  # a device that has failed knows none
                epoch = self.next_epoch()
            self._tell(Gone(self.rank, how, epoch))
            if how != EXITED and not stay:
                self._close()
            self._has_told = True  # last: where a signal's handler raises before, it is to be done once more

    def end(self) -> None:
        """Of one that has left: ends the connections."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        while self._connections:
            self._connections.popitem()[1].close()
        _open.discard(self)

    def _ready(self) -> list[int]:
        poll, by_fd, ready = select.poll(), dict[int, int](), set[int]()
        for rank, connection in list(self._connections.items()):
            if connection.fileno() < 0 or connection.has_unread:  # cut in the last vote; came early
                ready.add(rank)
            else:
                by_fd[connection.fileno()] = rank
                poll.register(connection, select.POLLIN)
        ready |= {by_fd[fd] for fd, _ in (poll.poll(0) if by_fd else ())}
        return sorted(ready)

    def _hear(self, rank: int) -> None:
        connection = self._connections.get(rank)
        if connection is None:  # left meanwhile
            return
        try:
            while connection.fileno() >= 0:
                got = connection.poll()
                if got is None:
                    return
                self._take(rank, *got)
        except (ConnectionClosed, TypeError):
            pass
        except OSError as error:
            if self._drop(rank):
                self._unsaid.append(
                    f"nothing is heard of rank {rank} any more ({error}): if it dies, only the deadline tells"
                )
            return
        if not self._drop(rank):
            return
        gone = self._said.get(rank, Gone(rank, DIED))
        if gone.how in (DIED, EXITED):
            self._note(gone)

    def _take(self, rank: int, message: Message, fds: list[int]) -> None:
        """What `rank` has said: of itself or, if that is rank 0, of others."""
        close_all(fds)
        if "how" not in message:  # of the bring-up, where a rank has given up before another one answered
            return
        gone = Gone(**message)
        if gone.rank == rank:
            self._said[rank] = gone
        if gone.rank != rank or gone.how != EXITED:
            self._note(gone)

    def _note(self, gone: Gone) -> None:
        self._gone.append(gone)
        self._quiet[gone.rank] = time.monotonic() + (_LAST_SECONDS if gone.how in (DIED, EXITED) else 0.0)
        if self.rank == 0:
            self._tell(gone)

    def _drop(self, rank: int) -> bool:
        """False if this rank has left meanwhile, and there is none any more."""
        connection = self._connections.pop(rank, None)
        if connection is not None:
            connection.close()
        return connection is not None

    def _tell(self, gone: Gone) -> None:
        for rank, connection in list(self._connections.items()):
            if rank == gone.rank:
                continue
            with contextlib.suppress(OSError):  # its end is news of its own
                connection.send(asdict(gone), time.monotonic() + _SEND_SECONDS)


def _unknown() -> int:
    return -1


_told_by: int | None = None  # the process that will be told of its end


def _be_told_of_the_end() -> None:
    """A child of multiprocessing's ends without `atexit`, and has this instead."""
    global _told_by
    if _told_by != os.getpid():
        _told_by = os.getpid()
        multiprocessing.util.Finalize(None, _exit, exitpriority=0)


def _exit() -> None:
    for lifeline in list(_open):
        lifeline.leave(EXITED)


def _after_fork() -> None:
    for lifeline in list(_open):
        lifeline._lock = threading.RLock()  # which another thread of the parent may have held
        lifeline._has_left = lifeline._has_told = True
        lifeline._close()


atexit.register(_exit)
os.register_at_fork(after_in_child=_after_fork)
