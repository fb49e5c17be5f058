"""The one file that a run brings home, written anew as each part ends:

    {"made_by": "bench.gb200 1", "place": how it was started, "world": ranks, "machine": "72 x NVIDIA GB200",
     "source_digest": "...", "began": UTC, "status": exit status, "trouble": what ended it or null,
     "nodes": {"0": what machine.py saw}, "doctor": what `doctor --json` said,
     "table": {"machine", "tp"}: launch shapes, as mnnvl_ar/tuning/<class>.json,
     "parts": [{"name", "status", "why", "seconds", "arguments", "notes", "failures", "log"}],
     "rows": [{"part", and the keys of bench/results.py}]}

status of a part: "done", "wrong" (a result of ours had other bits), "failed", "running", "not run" (why says it).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import whole

if TYPE_CHECKING:  # whoever only reads need not wait for PyTorch
    from bench.gb200.parts import Part
    from bench.gb200.watch import Outcome

MADE_BY = "bench.gb200 1"
BEGIN, END = "==== results begin ====", "==== results end ===="  # around the file in a log
MOST_LOG = 40_000  # characters of what a part has printed


class Record:
    """Of the first node. file: where it is kept."""

    def __init__(self, file: Path, place: str, world: int, nodes: dict[int, Any]) -> None:
        self.file = file
        self.found: dict[str, Any] = {
            "made_by": MADE_BY,
            "place": place,
            "world": world,
            "machine": "",
            "source_digest": nodes[0]["sources"],
            "began": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
            "status": None,
            "trouble": None,
            "nodes": {str(node): about for node, about in sorted(nodes.items())},
            "doctor": None,
            "table": None,
            "parts": [],
            "rows": [],
        }

    def skip(self, name: str, why: str) -> None:
        self.found["parts"].append({"name": name, "status": "not run", "why": why})
        self.save()

    def begin(self, part: Part, arguments: list[str]) -> None:
        about = {"name": part.name, "status": "running", "why": "", "arguments": arguments}
        self.found["parts"].append(about)
        self.save()

    def end(self, part: Part, outcome: Outcome, seconds: float, left: Path, log: Path) -> None:
        """Of the part begun last. left: what its first rank may have left; log: what that printed."""
        entry = self.found["parts"][-1]
        text = log.read_text(errors="replace") if log.exists() else ""
        self._take(part, left, text, entry)
        if entry.get("problems") and outcome.trouble:
            outcome.trouble = "; ".join(entry["problems"])
        entry["status"] = "failed" if outcome.trouble else "wrong" if outcome.wrong else "done"
        entry |= {"why": outcome.trouble or "", "seconds": round(seconds, 1), "failures": outcome.failures}
        if outcome.trouble:
            entry["states"] = outcome.states
            self.found["trouble"] = f"{part.name}: {outcome.trouble}"
        if part.name == "multicast" and entry["transports"] != ["multicast"] and not entry["why"]:
            entry["why"] = f"WITHOUT multicast, over {' and '.join(entry['transports'])}: {self._why_not()}"
        if part.leaves != "doctor":
            entry["log"] = text[-MOST_LOG:]
        self.save()

    def finish(self, status: int, trouble: str | None) -> None:
        self.found["status"] = status
        self.found["trouble"] = self.found["trouble"] or trouble
        self.save()

    @property
    def wrong(self) -> bool:
        return any(part["status"] == "wrong" for part in self.found["parts"])

    def save(self) -> None:
        head = {key: value for key, value in self.found.items() if key != "rows"}
        rows = ",\n".join(json.dumps(row) for row in self.found["rows"])
        text = f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{rows}\n]}}\n'
        whole.write(self.file, text)

    def _why_not(self) -> str:
        """What the doctor's self-test, which goes the same way, has said of its transport."""
        test = (self.found["doctor"] or {}).get("self_test", {})
        return str(test.get("transport_reason", "the doctor was not asked"))

    def _take(self, part: Part, left: Path, text: str, entry: dict[str, Any]) -> None:
        entry["transports"] = []
        if part.leaves == "doctor":
            try:
                self.found["doctor"] = json.loads(text)
                entry["problems"] = self.found["doctor"]["problems"]
            except ValueError:  # it did not come to that
                entry["log"] = text[-MOST_LOG:]
        if not left.exists():
            return
        content = json.loads(left.read_text())
        if part.leaves == "table":
            self.found["table"] = content
        elif part.leaves == "rows":
            self.found["machine"] = content["machine"]
            self.found["rows"] += [{"part": part.name, **row} for row in content["rows"]]
            entry["transports"] = sorted({row["transport"] for row in content["rows"] if "transport" in row})
            notes = left.with_suffix(".skipped.txt")
            entry["notes"] = notes.read_text().splitlines() if notes.exists() else []


def read(file: Path) -> dict[str, Any]:
    """A record, or the one within a log that `--print` has put there. Raises `ValueError` where there is none."""
    text = file.read_text()
    if BEGIN in text:
        _, _, text = text.rpartition(BEGIN)
        text, mark, _ = text.partition(END)
        if not mark:
            raise ValueError(f"{file}: the record in it is cut short")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: neither a record of bench.gb200 nor a log with one: {error}") from error
    if not isinstance(found, dict) or found.get("made_by") != MADE_BY:
        raise ValueError(f"{file}: not a record of {MADE_BY}")
    return found
