"""What ends or brings back a workspace's memory happens in turn: closing, sleeping, waking."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from mnnvl_ar.errors import MnnvlArError


class Turn:
    """One at a time. Another thread waits. A signal's handler, which runs in the thread whose turn it is, could wait
    for ever: it gets an error."""

    def __init__(self) -> None:
        self._lock, self._verb = threading.RLock(), ""
        self._hurries: list[Callable[[], object]] = []  # of those who wait

    @contextlib.contextmanager
    def of(self, verb: str, hurry: Callable[[], object] | None = None) -> Iterator[None]:
        """`hurry` is called while another one's turn is not over, be it begun before or behind this look."""
        with self._hurrying(hurry), self._lock:
            if self._verb:  # by this thread, as others would not have come here
                raise MnnvlArError(
                    f"{verb}: this thread is in {self._verb} of this workspace, which a signal's handler "
                    "interrupts; once more when the handler has returned"
                )
            self._verb = verb
            try:
                for each in [each for each in self._hurries if each is not hurry]:
                    each()
                yield
            finally:
                self._verb = ""

    @contextlib.contextmanager
    def _hurrying(self, hurry: Callable[[], object] | None) -> Iterator[None]:
        try:
            if hurry is not None:
                self._hurries.append(hurry)  # then it looks; whose turn begins says so, then looks here: one sees it
                if self._verb:
                    hurry()
            yield
        finally:
            if hurry in self._hurries:
                self._hurries.remove(hurry)
