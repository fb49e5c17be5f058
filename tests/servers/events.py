"""What the process of a scenario tells: a line of JSON each, on disk before the next thing begins."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Teller:
    def __init__(self, file: Path) -> None:
        self._out = file.open("a", buffering=1)

    def tell(self, event: str, **more: Any) -> None:
        self._out.write(json.dumps({"event": event, "at": time.time(), **more}) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """Those that are whole: the last line of a process that was killed may not be."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1] if line]
