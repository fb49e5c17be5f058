"""The machine's processes, as /proc shows them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


def command_lines() -> Iterator[str]:
    """Of every process that has one, its words parted by spaces."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            yield file.read_text().replace("\0", " ").strip()
