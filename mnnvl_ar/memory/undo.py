"""What must be given back, in the reverse of the order in which it was taken."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

_log = logging.getLogger("mnnvl_ar")


class Undo:
    """A stack of calls that give something back. `run` never raises: one that fails is logged and the rest still run.

    A failure is not swallowed: an unbind that fails silently is found only later, as a poisoned context (nccl#2115).
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def push(self, call: Callable[..., object], *arguments: Any) -> None:
        self._calls.append((call, arguments))

    def run(self) -> None:
        while self._calls:
            call, arguments = self._calls.pop()
            try:
                call(*arguments)
            except Exception as error:
                # While the process ends, the driver is often gone before us, and with it all that it held.
                if not sys.is_finalizing() and getattr(error, "code", "") != "CUDA_ERROR_DEINITIALIZED":
                    _log.warning("giving memory back failed, it may leak until the process ends: %s", error)
