"""FlashInfer's `trtllm` without NVLink multicast.

From 0.6.11 to 0.6.14, and under confidential computing later too, its memory comes from PyTorch's symmetric memory.
That makes multicast objects wherever the GPUs can, though `trtllm` has no use for them, and knows no switch but its
own.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from mnnvl_ar.memory import MULTICAST_SWITCHES

SWITCH = "TORCH_SYMM_MEM_DISABLE_MULTICAST"  # read by PyTorch each time that it makes memory

_lock = threading.Lock()
_inside = 0  # threads, which may be ranks
_before: str | None = None  # what the first of them found


@contextlib.contextmanager
def without_multicast() -> Iterator[None]:
    """Meanwhile PyTorch's symmetric memory makes no multicast in this process, and our own workspaces none either.
    Afterwards, when the last of the threads that are in here has left, the switch is as it was."""
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _before
    with _lock:
        if not _inside:
            _before = os.environ.get(SWITCH)
        _inside += 1
        os.environ[SWITCH] = MULTICAST_SWITCHES[SWITCH]


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside:
            return
        if _before is None:
            os.environ.pop(SWITCH, None)
        else:
            os.environ[SWITCH] = _before
