"""Which process this is, so that others can tell whether another one has taken its place in a group."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import hosts


def this() -> dict[str, str]:
    """As a store can hold it."""
    return _of(os.getpid())


@functools.lru_cache(maxsize=1)
def _of(pid: int) -> dict[str, str]:
    namespace = "0"
    with contextlib.suppress(OSError):
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)
    machine = hosts.identity().split("/")[1]
    return {"where": f"{machine}/{namespace}", "pid": str(pid), "since": _since(pid)}


def _since(pid: int) -> str:
    """When it began, in clock ticks since boot; empty if it is no more, or that cannot be known."""
    with contextlib.suppress(OSError):
        state, *_, since = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
        return "" if state in "ZX" else since
    return ""


def is_another(record: Mapping[str, Any]) -> bool:
    """Whether `record` is of another process that lives. False if that cannot be known: on another host, or in another
    container."""
    mine = this()
    if any(key not in record for key in mine) or record["where"] != mine["where"] or record["pid"] == mine["pid"]:
        return False
    return bool(record["since"]) and _since(int(record["pid"])) == record["since"]


def name_of(record: Mapping[str, Any]) -> str:
    return f"process {record['pid']}" + (", this one, for another group" if record == {**record, **this()} else "")
