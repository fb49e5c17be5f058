"""File descriptors that a bring-up will need are looked for before it needs them.

Whoever runs out of them in the middle of a step can neither receive a peer's nor tell why. So they are taken, or tried
for, at a point where a rank that has too few can still say so to all.
"""

from __future__ import annotations

import errno
import os

SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)  # this process or host has run out of something


class Reserve:
    """Descriptors that are held until they are needed."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def take(self, count: int) -> None:
        """Holds `count` of them, or `OSError` that says how many are missing, and none is held."""
        try:
            while len(self._fds) < count:
                self._fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            text = f"needs {count} file descriptors more, and has {len(self._fds)}: {os.strerror(error.errno or 0)}"
            self.give()
            raise OSError(error.errno, text) from error

    def __len__(self) -> int:
        return len(self._fds)

    def give(self, count: int | None = None) -> int:
        """Gives up `count` of them, or all; how many that were."""
        given = self._fds[: len(self._fds) if count is None else count]
        del self._fds[: len(given)]
        for fd in given:
            os.close(fd)
        return len(given)


def require(count: int) -> None:
    """`OSError` if this process has no room for `count` more descriptors."""
    reserve = Reserve()
    reserve.take(count)
    reserve.give()
