"""What the first rank is at, in a file, for whoever has to name the one that hangs or crashed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "MNNVL_AR_BENCH_PROGRESS"


@dataclass(frozen=True)
class Stage:
    """what: in words. peer: whose code runs, None for nobody's in particular. limit: seconds it may take."""

    what: str
    peer: str | None
    limit: float


def report(what: str, peer: str | None = None, limit: float = 60.0) -> None:
    if (file := os.environ.get(VARIABLE)) and os.environ.get("RANK") == "0":
        draft = Path(file + ".new")
        draft.write_text(json.dumps(asdict(Stage(what, peer, limit))))
        draft.replace(file)


def read(file: Path) -> tuple[Stage, float]:
    """The last stage reported and when."""
    try:
        return Stage(**json.loads(file.read_text())), file.stat().st_mtime
    except FileNotFoundError:
        return Stage("starting", None, 180.0), 0.0
