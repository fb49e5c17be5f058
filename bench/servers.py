"""The tables of docs/benchmarks.md of what servers did (tests/servers), from bench/results/servers_*.json.

Empty where nothing was recorded. What failed is in the table, and says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATTERN = "servers_*.json"
Run = dict[str, Any]


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Records by file name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob(PATTERN))}


def section(records: dict[str, dict[str, Any]], today: str) -> str:
    return "\n\n".join(part for record in records.values() for part in _parts(record, today))


def _parts(record: dict[str, Any], today: str) -> list[str]:
    runs: list[Run] = record["runs"]
    if not runs:
        return []
    stale = sum(run["source_digest"] != today for run in runs)
    age = f", {stale} **of earlier sources**" if stale else ""
    head = f"{record['machine']}, unmodified servers, TP2: {len(runs)} scenarios{age}"
    return [
        f"{head} ([servers.md](servers.md)).",
        *filter(None, (_speed(runs), _traffic(runs), _sleep(runs), _faults(runs))),
    ]


def _title(run: Run) -> str:
    server = run["server"] or run["scenario"].split("/")[0]
    return f"{server} {run['installed'].get('version', '')}".strip()


def _compared_by(run: Run) -> tuple[str, str]:
    """The server's release, and the scenario without its mode: what modes are compared in."""
    return _title(run), run["scenario"].rsplit("/", 1)[0]


def _measured(run: Run, kind: str) -> list[dict[str, Any]]:
    return [each for each in run["measured"] if each["kind"] == kind]


def _failed(run: Run) -> str:
    return "" if run["passed"] else " **FAILED**"


def _step(found: dict[str, Any]) -> str:
    """Earlier runs have no quartiles."""
    quartiles = found.get("quartiles_ms")
    return f"{found['median_ms']:.3f}" + (" ({:.2f} to {:.2f})".format(*quartiles) if quartiles else "")


def _over(found: dict[str, Any], as_is: dict[str, Any]) -> str:
    """By how much longer a step takes than the server's as it is."""
    return f", {100 * (found['median_ms'] / as_is['median_ms'] - 1):+.1f} %" if as_is else ""


def _speed(runs: list[Run]) -> str:
    """A line a model and mode: milliseconds a step, and how its answers compare."""
    lines = []
    as_is = {_compared_by(run): _steps(run) for run in runs if run["mode"] == "as_is"}
    compared = {_compared_by(run): run for run in runs if run["mode"] == "fp32"}
    for run in runs:
        if not _measured(run, "answers"):
            continue
        release, subject = _compared_by(run)
        steps, others = _steps(run), {} if run["mode"] == "as_is" else as_is.get((release, subject), {})
        # Until 2026-12-01 the comparison did not say of which release.
        beside = compared.get((release, subject)) or compared.get((run["server"], subject))
        truth = next(iter(_measured(beside, "reference")), {}) if beside else {}
        far = truth.get("to_fp32", {}).get(run["mode"])
        same = truth.get(f"ours_and_{run['mode']}")
        counted = next((each["counted"] for each in run["measured"] if each.get("counted")), {})
        cells = [
            f"{_title(run)}, {run['model']}",
            f"{run['mode'].replace('_', ' ')}{_failed(run)}",
            *(_step(steps[b]) + _over(steps[b], others.get(b, {})) if b in steps else "-" for b in ("1", "8", "64")),
            f"{100 * same['equal_tokens']:.1f} %" if same else "-",
            f"{far['logprob_apart_mean']:.4f}" if far else "-",
            f"{run['start_up_s']:.0f} s" if run["start_up_s"] else "-",
            f"{counted['workspace_bytes'] / 2**20:.0f} MiB" if counted else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return ""
    names = (
        "server, model",
        "mode",
        "ms a step (quartiles), over as it is, batch 1",
        "8",
        "64",
        "equal tokens",
        "from fp32",
        "start",
        "workspace",
    )
    return "\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|", *lines])


def _steps(run: Run) -> dict[str, Any]:
    """By batch."""
    found: dict[str, Any] = (_measured(run, "steps") or [{"batches": {}}])[0]["batches"]
    return found


def _sleep(runs: list[Run]) -> str:
    lines = []
    for run in runs:
        for each in _measured(run, "sleep"):
            bits, after = "the same bits" if each["same_bits"] else "other bits", each["awake_after_s"]
            lines.append(f"{_title(run)}, {run['scenario']}{_failed(run)}: {bits} after sleep, awake in {after:.1f} s.")
    return "\n\n".join(lines)


def _traffic(runs: list[Run]) -> str:
    lines = []
    for run in runs:
        for each in _measured(run, "traffic"):
            way = "HTTP" if each["http"] else "offline"
            calls = each["counted"].get("calls", 0) if each.get("counted") else "-"
            size = f"{each['requests']} at {each['concurrency']}, {way}"
            cells = (_title(run), f"{run['scenario']}{_failed(run)}", size, each["answered"], calls)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    names = ("server", "scenario", "requests", "answered", "our calls, a rank")
    return "\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|", *lines]) if lines else ""


def _faults(runs: list[Run]) -> str:
    lines = []
    for run in runs:
        found = run.get("fault")
        if not found or not found["harmed"]:
            continue
        who = found["named_by_ours"] or found["named_by_server"]
        by = "ours" if found["named_by_ours"] else "the server"
        named = f"rank {', '.join(map(str, who))} by {by}" if who else "nobody"
        after = "" if found["named_after_s"] is None else f", {found['named_after_s']:.1f} s"
        dead = found["cut"] if found["dead_after_s"] is None else f"{found['dead_after_s']:.1f} s"
        cells = (
            _title(run),
            f"rank {found['rank']}: {found['kind']}, in {found['where']}",
            f"{run['mode'].replace('_', ' ')}{_failed(run)}",
            f"{named}{after}",
            dead or "survived",
        )
        lines.append(f"| {' | '.join(cells)} |")
    names = ("server", "fault", "mode", "named", "engine dead after")
    return "\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|", *lines]) if lines else ""
