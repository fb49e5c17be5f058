"""What a rank is at, in a file, for whoever has to name the one that hangs or crashed. Whoever starts ranks says by a
variable which of them tell, and where."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "MNNVL_AR_BENCH_PROGRESS"
STARTING = "starting"


@dataclass(frozen=True)
class Stage:
    """what: in words. peer: whose code runs, None for nobody's in particular. limit: seconds it may take."""

    what: str
    peer: str | None
    limit: float


def report(what: str, peer: str | None = None, limit: float = 60.0) -> None:
    if file := os.environ.get(VARIABLE):
        draft = Path(file + ".new")
        draft.write_text(json.dumps(asdict(Stage(what, peer, limit))))
        draft.replace(file)


def so_far(done: int, of: int, seconds: float) -> str:
    """ "7 of 20, 35 s, some 65 s left": as if what is left took as long as what was done, each."""
    return f"{done} of {of}, {seconds:.0f} s, some {seconds / done * (of - done):.0f} s left"


def read(file: Path) -> tuple[Stage, float]:
    """The last stage reported and when."""
    try:
        return Stage(**json.loads(file.read_text())), file.stat().st_mtime
    except FileNotFoundError:
        return Stage(STARTING, None, 180.0), 0.0
