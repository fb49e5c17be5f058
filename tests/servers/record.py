"""bench/results/servers_MACHINE.json: the newest run of each scenario with each release of its server.

{"machine", "runs": [{"scenario", "server", "model", "mode", "installed", "source_digest", "when", "passed",
                      "problems", "start_up_s", "measured": [...], "fault": {...}}]}
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Run = dict[str, Any]


def key(run: Run) -> tuple[str, str]:
    return str(run["scenario"]), str(run["installed"].get("version", ""))


def add(file: Path, machine: str, runs: list[Run]) -> None:
    """Adds runs to what is there, in place of older ones of the same scenario and release."""
    kept: dict[tuple[str, str], Run] = {}
    before = json.loads(file.read_text()) if file.exists() else {"machine": machine, "runs": []}
    if before["machine"] != machine:
        raise ValueError(f"{file} is of {before['machine']}, this is {machine}")
    for run in (*before["runs"], *runs):
        if key(run) not in kept or run["when"] >= kept[key(run)]["when"]:
            kept[key(run)] = run
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(run) for run in sorted(kept.values(), key=key))
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(f'{{"machine": {json.dumps(machine)}, "runs": [\n{rows}\n]}}\n')
    draft.replace(file)
